"""An edge model that runs were merged into reads rows as they did, unless told otherwise."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import edit, refusal

import edgezo
from edgezo.errors import ConfigError, DataError
from edgezo.manifest_reader import read_manifest
from edgezo.runtime.tuned import write_tuned

Command = Callable[..., Any]
TASK: dict[str, Any] = {"template": "{text} It was", "labels": {"0": "terrible", "1": "great"}}
OPTIONS = ["--template", "{text} It was", "--labels", "terrible,great"]
QUICK: dict[str, Any] = {"steps": 3, "eps": 1e-3, "lr": 1e-2, "batch": 2, "start": "none", "threads": 1}
TEXTS = ["the film", "a dull plot", "great fun"]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    rows = [{"prompt": f"the film {number}", "completion": " is great"} for number in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "prompts.jsonl")


def labelled(edge: Path, run: Path, reviews: str) -> Path:
    edgezo.tune(edge, run, data=reviews, **TASK, **QUICK)
    return run


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


def test_rows_of_another_kind_put_all_of_it_aside(invoke: Command, exported_dir: Path, prompts: str, reviews: str, tmp_path: Path) -> None:
    edgezo.tune(exported_dir, tmp_path / "run", data=prompts, stop="!", max_tokens=3, **QUICK)
    mine = merged(exported_dir, tmp_path / "mine", tmp_path / "run")
    found = invoke("eval", str(mine), "--data", reviews, *OPTIONS)  # --stop is of no use to labels, which is refused
    assert (found.code, found.err) == (0, "")
    (tmp_path / "corpus.txt").write_text("the film is great. " * 20)
    labels = merged(mine, tmp_path / "labels", labelled(mine, tmp_path / "second", reviews))
    assert edgezo.evaluate(labels, tmp_path / "corpus.txt").evaluation.perplexity is not None
    choices = [{"text": "the film", "a": "great", "b": "terrible"}]
    (tmp_path / "choices.jsonl").write_text(json.dumps(choices[0]) + "\n")
    (chosen,) = edgezo.predict(labels, data=tmp_path / "choices.jsonl", template="{text} is", choices=["{a}", "{b}"])
    assert chosen.text in {"great", "terrible"}


def test_it_is_put_aside_as_that_of_a_run_is(exported_dir: Path, prompts: str, reviews: str, run: Path, tmp_path: Path) -> None:
    mine = merged(exported_dir, tmp_path / "mine", run)
    (tmp_path / "corpus.txt").write_text("the film is great. " * 20)
    (tmp_path / "answers.jsonl").write_text(json.dumps({"prompt": "the film is", "answer": "great"}) + "\n")
    asked: list[tuple[Any, dict[str, Any]]] = [
        (prompts, {"template": ""}),
        (tmp_path / "corpus.txt", {}),
        (tmp_path / "answers.jsonl", {"answer_field": "answer", "template": "", "max_tokens": 3}),
        (reviews, {"labels": "bad,good"}),  # of the same kind, after the same template
        (reviews, {}),
    ]
    found = [edgezo.evaluate(mine, data, **given).evaluation for data, given in asked]
    assert found == [edgezo.evaluate(exported_dir, data, run=run, step="last", **given).evaluation for data, given in asked]
    assert [evaluation.accuracy is None for evaluation in found] == [True, True, True, False, False]
    assert found[3] == edgezo.evaluate(mine, reviews, template="{text} It was", labels="bad,good", max_length=24).evaluation != found[4]
    with pytest.raises(DataError, match="field 'text' does not exist"):
        edgezo.evaluate(mine, prompts)


def test_an_adapter_is_not_what_it_tells_of(invoke: Command, lora_dir: Path, reviews: str, tmp_path: Path) -> None:
    mine = merged(lora_dir, tmp_path / "mine", labelled(lora_dir, tmp_path / "run", reviews))
    write_tuned(mine, [labelled(mine, tmp_path / "next", reviews)], [1.0], "last", tmp_path / "adapter", "peft", threads=1)
    asked = ["generate", str(mine), "--prompt", "the film", "--max-tokens", "1"]
    assert "learned to choose among labels" in invoke(*asked).err
    found = invoke(*asked, "--adapter", str(tmp_path / "adapter"))
    assert (found.code, found.err) == (0, "")


def test_it_tells_nothing_of_what_was_learned_from(lora_dir: Path, tmp_path: Path) -> None:
    """Rewards of dpo are relative to the base, and an objective of one's own is code to import."""
    rows = [{"prompt": "the film is", "chosen": " great", "rejected": " terrible"}] * 4
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    edgezo.tune(lora_dir, tmp_path / "run", data=tmp_path / "pairs.jsonl", objective="dpo", **QUICK)
    mine = merged(lora_dir, tmp_path / "mine", tmp_path / "run")
    assert {"objective", "beta"}.isdisjoint(read_manifest(mine).reading or {"objective"})
    pairs = tmp_path / "pairs.jsonl"
    found = edgezo.evaluate(mine, pairs).evaluation
    expected = edgezo.evaluate(lora_dir, pairs, run=tmp_path / "run", step="last", objective="preference").evaluation
    assert found.loss == pytest.approx(expected.loss, abs=1e-5)
    assert found.loss != pytest.approx(math.log(2), abs=1e-5)  # that of dpo relative to itself


def test_runs_that_differ_leave_none(invoke: Command, exported_dir: Path, run: Path, reviews: str, tmp_path: Path) -> None:
    edgezo.tune(exported_dir, tmp_path / "same", data=reviews, max_length=24, seed=1, **TASK, **QUICK)
    edgezo.tune(exported_dir, tmp_path / "other", data=reviews, template="{text} All", labels=TASK["labels"], **QUICK)
    both = merged(exported_dir, tmp_path / "both", run, tmp_path / "same")
    assert read_manifest(both).reading == read_manifest(merged(exported_dir, tmp_path / "one", run)).reading is not None
    apart = merged(exported_dir, tmp_path / "apart", run, tmp_path / "other")
    assert read_manifest(apart).reading is None
    with pytest.raises(ConfigError, match=r"^a text fills a template"):
        edgezo.predict(apart, texts=TEXTS)
    told = invoke("merge", str(exported_dir), str(run), str(tmp_path / "other"), "-o", str(tmp_path / "again")).err
    assert (
        told
        == f"note: {tmp_path / 'again'} does not keep how rows are read: its runs read them differently; give eval and predict their --template and --labels, or --task\n"
    )


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


def test_the_command_line_needs_no_run_to_read_by(
    invoke: Command, exported_dir: Path, prompts: str, reviews: str, run: Path, tmp_path: Path
) -> None:
    mine = merged(exported_dir, tmp_path / "mine", run)
    assert (
        invoke("predict", str(mine), "--text", "the film").out
        == invoke("predict", str(exported_dir), "--run", str(run), "--step", "last", "--text", "the film").out
    )
    told = invoke("generate", str(mine), "--prompt", "the film", "--max-tokens", "1").err
    use = f"edgezo predict {mine} --text '...'"
    assert told == f"note: this model learned to choose among labels, not to write text; for a label: {use}\n"
    assert "{text} It was" in invoke("inspect", str(mine)).out
    assert re.match(r"merged +accuracy", invoke("eval", str(mine), "--data", reviews).out)
    assert re.match(r"base +accuracy", invoke("eval", str(exported_dir), "--data", reviews, *OPTIONS).out)
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
        ({"lr": 1.0}, "reading: 'lr' is no setting of it; these are template, labels, "),
        ({"objective": "json:loads"}, "reading: 'objective' is no setting of it; these are template, labels, "),  # which would be imported
        ({"template": 3}, "reading: --template 3: input should be a valid string; merge the runs again"),
        ({"max_tokens": 0}, "reading: --max-tokens 0: input should be greater than 0; merge the runs again"),
        ([], "reading: Input should be an object; export the model again"),
    ],
)
def test_a_damaged_one_is_refused(edge_dir: Path, reading: object, problem: str) -> None:
    edit(edge_dir, lambda raw: raw.update(reading=reading))
    assert refusal(edge_dir).startswith(f"/manifest.json: {problem}")


def test_one_of_an_older_version_is_refused(edge_dir: Path) -> None:
    edit(edge_dir, lambda raw: raw.update(reading={"template": "{text}"}, version=7))
    assert refusal(edge_dir) == "/manifest.json: reading: version 7 has none; merge the runs again"
