"""An edge model that runs were merged into reads rows as they did, unless told otherwise."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import edit, refusal

import edgezo
from edgezo.errors import ConfigError
from edgezo.manifest_reader import read_manifest
from edgezo.runtime.tuned import write_tuned

Command = Callable[..., Any]
TASK: dict[str, Any] = {"template": "{text} It was", "labels": {"0": "terrible", "1": "great"}}
QUICK: dict[str, Any] = {"steps": 3, "eps": 1e-3, "lr": 1e-2, "batch": 2, "start": "none", "threads": 1}
TEXTS = ["the film", "a dull plot", "great fun"]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    rows = [{"prompt": f"the film {number}", "completion": " is great"} for number in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "prompts.jsonl")


def merged(edge: Path, output: Path, *runs: Path) -> Path:
    write_tuned(edge, list(runs), [1 / len(runs)] * len(runs), "last", output, threads=1)
    return output


@pytest.fixture
def run(exported_dir: Path, reviews: str, tmp_path: Path) -> Path:
    edgezo.tune(exported_dir, tmp_path / "run", data=reviews, max_length=24, **TASK, **QUICK)
    return tmp_path / "run"


def test_it_predicts_and_evaluates_as_the_run_does(exported_dir: Path, run: Path, reviews: str, tmp_path: Path) -> None:
    mine = merged(exported_dir, tmp_path / "mine", run)
    reading = read_manifest(mine).reading
    assert reading is not None
    assert {name: reading[name] for name in ("template", "labels", "max_length")} == {**TASK, "max_length": 24}
    found = edgezo.predict(mine, texts=TEXTS)
    assert found == edgezo.predict(exported_dir, run=run, step="last", texts=TEXTS)
    assert {prediction.label for prediction in found} <= {"0", "1"}
    assert edgezo.evaluate(mine, reviews).evaluation == edgezo.evaluate(exported_dir, reviews, run=run, step="last").evaluation


def test_what_is_given_goes_before_it(exported_dir: Path, run: Path, tmp_path: Path) -> None:
    mine = merged(exported_dir, tmp_path / "mine", run)
    other = edgezo.predict(mine, texts=TEXTS, template="{text} All in all it was")
    assert other == edgezo.predict(exported_dir, run=run, step="last", texts=TEXTS, template="{text} All in all it was")
    assert other != edgezo.predict(mine, texts=TEXTS)
    (tmp_path / "own.yaml").write_text(
        "name: own\ndescription: d\nfields: [text]\nsettings:\n  template: '{text} A'\n  labels: yes=good,no=bad\n"
    )
    assert set(edgezo.predict(mine, texts=TEXTS, task=tmp_path / "own.yaml")[0].probabilities) == {"yes", "no"}


def test_runs_that_differ_leave_none(exported_dir: Path, run: Path, reviews: str, tmp_path: Path) -> None:
    edgezo.tune(exported_dir, tmp_path / "same", data=reviews, max_length=24, seed=1, **TASK, **QUICK)
    edgezo.tune(exported_dir, tmp_path / "other", data=reviews, template="{text} All", labels=TASK["labels"], **QUICK)
    both = merged(exported_dir, tmp_path / "both", run, tmp_path / "same")
    assert read_manifest(both).reading == read_manifest(merged(exported_dir, tmp_path / "one", run)).reading
    apart = merged(exported_dir, tmp_path / "apart", run, tmp_path / "other")
    assert read_manifest(apart).reading is None
    with pytest.raises(ConfigError, match=r"^a text fills a template"):
        edgezo.predict(apart, texts=TEXTS)


def test_a_later_run_takes_its_place(exported_dir: Path, run: Path, prompts: str, tmp_path: Path) -> None:
    mine = merged(exported_dir, tmp_path / "mine", run)
    edgezo.tune(mine, tmp_path / "next", data=prompts, max_tokens=3, **QUICK)
    reading = read_manifest(merged(mine, tmp_path / "twice", tmp_path / "next")).reading
    assert reading is not None
    assert "labels" not in reading
    (answer,) = edgezo.predict(tmp_path / "twice", texts=["the film 1"])
    assert answer == edgezo.predict(mine, run=tmp_path / "next", step="last", texts=["the film 1"])[0]
    assert answer.text is not None


def test_an_older_edge_model_keeps_its_version_and_has_none(edge_dir: Path, reviews: str, tmp_path: Path) -> None:
    """Its version also says what its graphs have."""
    edit(edge_dir, lambda raw: raw.update(version=7))
    edgezo.tune(edge_dir, tmp_path / "run", data=reviews, **TASK, **QUICK)
    manifest = read_manifest(merged(edge_dir, tmp_path / "mine", tmp_path / "run"))
    assert (manifest.version, manifest.reading) == (7, None)


def test_the_command_line_needs_no_run_to_read_by(invoke: Command, exported_dir: Path, prompts: str, run: Path, tmp_path: Path) -> None:
    mine = merged(exported_dir, tmp_path / "mine", run)
    assert (
        invoke("predict", str(mine), "--text", "the film").out
        == invoke("predict", str(exported_dir), "--run", str(run), "--step", "last", "--text", "the film").out
    )
    told = invoke("generate", str(mine), "--prompt", "the film", "--max-tokens", "1").err
    use = f"edgezo predict {mine} --text '...'"
    assert told == f"note: this model learned to choose among labels, not to write text; for a label: {use}\n"
    assert "{text} It was" in invoke("inspect", str(mine)).out
    plain = json.loads(invoke("generate", str(mine), "--prompt", "the film", "--max-tokens", "8", "--json").out)["text"]
    ending = plain[2:4]
    edgezo.tune(mine, tmp_path / "stops", data=prompts, stop=ending, **{**QUICK, "lr": 1e-9})
    stops = merged(mine, tmp_path / "stopping", tmp_path / "stops")
    assert (
        json.loads(invoke("generate", str(stops), "--prompt", "the film", "--max-tokens", "8", "--json").out)["text"]
        == plain.split(ending)[0]
    )


@pytest.mark.parametrize(
    ("reading", "problem"),
    [
        ({"lr": 1.0}, "reading: 'lr' is no setting of a task; these are template, labels,"),
        ({"template": 3}, "reading: template 3: input should be a valid string"),
        ({"max_tokens": 0}, "reading: max_tokens 0: input should be greater than 0"),
        ([], "reading: Input should be an object"),
    ],
)
def test_a_damaged_one_is_refused(edge_dir: Path, reading: object, problem: str) -> None:
    edit(edge_dir, lambda raw: raw.update(reading=reading))
    message = refusal(edge_dir)
    assert message.startswith(f"/manifest.json: {problem}")
    assert message.endswith("; export the model again")
