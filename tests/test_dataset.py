"""Validation rows set aside from the training file: seeded, told, the same when a run goes on, and none of a small file unless asked for; and patience."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_encoders

import edgezo
from edgezo.cli import tune_rows
from edgezo.config import DEFAULT_PATIENCE, make_config
from edgezo.errors import DataError, RunError
from edgezo.export import export_model
from edgezo.runtime.check import check_run
from edgezo.runtime.data_summary import data_summary
from edgezo.runtime.dataset import LEAST_TO_SHARE, Dataset, read_dataset, weak_validation
from edgezo.runtime.evaluation import Evaluation, evaluations_waited
from edgezo.runtime.journal import Journal
from edgezo.runtime.journal_reader import read_journal
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.reports import Reporter
from edgezo.runtime.run import read_run

TASK: dict[str, Any] = {"template": "{text} It was", "labels": "terrible,great", "start": "none"}
FAST: dict[str, Any] = {**TASK, "lr": 1e-4, "eps": 1e-3, "batch": 4, "threads": 1}


@pytest.fixture
def many(write_rows: Callable[..., str]) -> str:
    """A file of 200 rows, all of them different."""
    return write_rows([{"text": f"film {number} is {'great' if number % 2 else 'long'}", "label": number % 2} for number in range(200)])


def split(model: EdgeModel, data: str, **settings: Any) -> tuple[Dataset, list[str]]:
    notices: list[str] = []
    return read_dataset(model, make_config(None, {"data": data, **TASK, **settings}), notices.append), notices


def prompts(dataset: Dataset) -> tuple[set[Any], set[Any]]:
    assert dataset.valid is not None
    kept, aside = ({tuple(example.pairs[0][0]) for example in part.examples} for part in (dataset.train, dataset.valid))
    return kept, aside


def test_rows_are_set_aside_by_the_seed_and_told(model: EdgeModel, many: str) -> None:
    dataset, notices = split(model, many)
    kept, aside = prompts(dataset)
    assert (len(kept), len(aside), kept & aside) == (170, 30, set())
    assert notices == [
        f"validation: 30 of the 200 rows of {many} set aside, drawn by the seed; --valid FILE takes others, --valid-share 0 tunes on all"
    ]
    assert prompts(split(model, many)[0]) == (kept, aside)
    assert prompts(split(model, many, seed=1)[0]) != (kept, aside)


def test_no_more_are_set_aside_than_an_evaluation_uses(model: EdgeModel, many: str) -> None:
    assert len(prompts(split(model, many, eval_rows=12)[0])[1]) == 12
    assert len(prompts(split(model, many, valid_share=0.5)[0])[1]) == 100


def test_none_are_set_aside_when_refused_or_given(model: EdgeModel, many: str) -> None:
    dataset, notices = split(model, many, valid_share=0.0)
    assert (dataset.valid, notices) == (None, [])
    dataset, notices = split(model, many, valid=many)
    assert dataset.valid is not None
    assert (len(dataset.train.examples), len(dataset.valid.examples), notices) == (200, 200, [])


def test_of_a_small_file_none_are_set_aside_unless_asked_for(model: EdgeModel, write_rows: Callable[..., str]) -> None:
    few = write_rows([{"text": str(number), "label": number % 2} for number in range(LEAST_TO_SHARE - 1)], "few.jsonl")
    dataset, _ = split(model, few)
    assert dataset.valid is None
    advice = "; --valid FILE gives others, --valid-share 0.3 sets some aside"
    assert weak_validation(dataset) == f"no validation: {few} has 99 rows, files under 100 rows are not split{advice}"
    dataset, _ = split(model, few, valid_share=0.3)
    assert (len(prompts(dataset)[1]), weak_validation(dataset)) == (30, None)
    dataset, _ = split(model, few, valid_share=0.001)
    assert dataset.valid is None
    assert (
        weak_validation(dataset)
        == f"no validation: {few} has 99 rows, 0.001 of them is none{advice.replace('--valid-share 0.3', 'a larger --valid-share')}"
    )
    assert weak_validation(split(model, few, valid_share=0.0)[0]) is None


def test_validation_on_the_rows_that_are_learned_is_told(model: EdgeModel, many: str, write_rows: Callable[..., str]) -> None:
    others = write_rows([{"text": "other", "label": 0}], "others.jsonl")
    assert weak_validation(split(model, many, valid=others)[0]) is None
    copied = Path(many).with_name("copied.jsonl")
    copied.write_bytes(Path(many).read_bytes())
    for same in (many, str(copied)):
        told = weak_validation(split(model, many, valid=same)[0])
        assert told is not None
        assert told.startswith(f"warning: --valid {same} has the rows that are learned, and cannot tell")


def test_that_nothing_is_set_aside_is_told_when_a_run_starts(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    notices: list[str] = []
    told = {"threads": 1, "reporter": Reporter(notice=notices.append)}
    edgezo.tune(exported_dir, tmp_path / "run", data=reviews, steps=1, **{**FAST, **told})
    assert sum(notice.startswith("no validation: ") for notice in notices) == 1
    notices.clear()
    edgezo.tune(exported_dir, tmp_path / "run", resume=True, steps=2, **told)
    assert [notice.split(",")[0] for notice in notices] == ["going on after step 1 of 2 (1 before)"]


def test_plain_text_is_set_aside_in_rows(model: EdgeModel, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("the film is great and the plot is terrible " * 200, encoding="utf-8")
    notices: list[str] = []
    dataset = read_dataset(model, make_config(None, {"data": str(tmp_path / "book.txt"), "max_length": 16}), notices.append)
    assert dataset.valid is not None
    count = len(dataset.train.examples) + len(dataset.valid.examples)
    assert len(dataset.valid.examples) == round(0.15 * count)
    assert f"validation: {len(dataset.valid.examples)} of the {count} rows of {tmp_path / 'book.txt'} set aside" in notices[-1]


def test_a_run_that_goes_on_and_a_check_use_the_same_rows(exported_dir: Path, many: str, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    edgezo.tune(exported_dir, whole, data=many, steps=6, eval_every=2, schedule="constant", **FAST)
    edgezo.tune(exported_dir, parts, data=many, steps=3, eval_every=2, schedule="constant", **FAST)
    edgezo.tune(exported_dir, parts, resume=True, steps=6, threads=1)
    one, other = (read_journal(run / "journal.bin") for run in (whole, parts))
    assert [record.projected_grads for record in one.records] == [record.projected_grads for record in other.records]
    assert one.evaluations.items() <= other.evaluations.items()
    assert check_run(parts, EdgeModel(exported_dir, threads=1), every=1).problems == []


def test_a_run_of_before_goes_on_with_all_its_rows(exported_dir: Path, many: str, tmp_path: Path) -> None:
    """The header of an earlier version knows neither valid_share nor patience."""
    edgezo.tune(exported_dir, tmp_path / "run", data=many, valid_share=0.0, steps=4, **FAST)
    path = tmp_path / "run" / "journal.bin"
    contents = read_journal(path)
    config = {name: value for name, value in contents.header["config"].items() if name not in {"valid_share", "patience"}}
    path.unlink()
    with Journal.create(path, {**contents.header, "config": config}) as journal:
        for record in contents.records[:2]:
            journal.append(record)
    edgezo.tune(exported_dir, tmp_path / "run", resume=True, threads=1)
    assert read_journal(path).records == contents.records
    assert (read_run(tmp_path / "run").config.valid_share, read_run(tmp_path / "run").config.patience) == (0.0, 0)


def test_a_run_without_validation_rows_gets_none_later(exported_dir: Path, many: str, reviews: str, tmp_path: Path) -> None:
    edgezo.tune(exported_dir, tmp_path / "run", data=many, valid_share=0.0, steps=1, **FAST)
    with pytest.raises(
        RunError, match=re.escape(f"{reviews}: the run was started without validation data; leave it out or start a new run")
    ):
        edgezo.tune(exported_dir, tmp_path / "run", resume=True, valid=reviews, steps=2, threads=1)


def test_patience_ends_a_run_that_gets_no_better_and_resume_goes_on(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    settings = {**FAST, "lr": 1e-12, "valid": reviews, "data": reviews, "eval_every": 2}
    result = edgezo.tune(exported_dir, tmp_path / "run", steps=20, patience=3, **settings)
    assert (result.ended, result.best_step) == ("no longer better", 0)
    assert result.steps == 6
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["ended"] == "no longer better"
    assert edgezo.tune(exported_dir, tmp_path / "run", resume=True, threads=1).steps == 8
    result = edgezo.tune(exported_dir, tmp_path / "run", resume=True, patience=0, threads=1)
    assert (result.steps, result.ended) == (20, "finished")
    assert edgezo.tune(exported_dir, tmp_path / "all", steps=6, patience=3, **settings).ended == "finished"  # with its last step
    result = edgezo.tune(exported_dir, tmp_path / "all", resume=True, patience=3, steps=6, threads=1)
    assert dict(tune_rows(exported_dir, tmp_path / "all", result))["go on"].endswith("--resume --steps 12 --patience 0")


@pytest.mark.parametrize(
    ("losses", "step", "waited"),
    [({}, 4, 0), ({0: 3, 2: 1, 4: 2, 6: 2}, 6, 2), ({0: 3, 2: 2, 3: 1, 4: 2.5, 6: 2.5}, 6, 2), ({0: 1, 2: 2, 3: 2}, 3, 1)],
)
def test_patience_counts_scheduled_evaluations_after_the_best_of_them(losses: dict[int, float], step: int, waited: int) -> None:
    """An evaluation at 3, where an earlier call ended, is none of every 2 steps, nor the best of them."""
    assert evaluations_waited({number: Evaluation(8, loss) for number, loss in losses.items()}, 2, step) == waited


@pytest.mark.parametrize(
    ("given", "patience"), [({}, DEFAULT_PATIENCE), ({"steps": 5}, 0), ({"minutes": 5}, 0), ({"steps": 5, "patience": 2}, 2)]
)
def test_patience_is_off_where_a_length_was_given(given: dict[str, Any], patience: int) -> None:
    assert make_config(None, {"data": "x", **given}).allowed_patience == patience


def test_the_notice_reaches_whoever_listens(exported_dir: Path, many: str, tmp_path: Path) -> None:
    notices: list[str] = []
    result = edgezo.tune(exported_dir, tmp_path / "run", data=many, steps=1, reporter=Reporter(notice=notices.append), **FAST)
    assert result.before is not None
    assert result.before.rows == 30
    assert notices[0].startswith("validation: 30 of the 200 rows of ")


def test_a_share_that_leaves_no_rows_is_refused(exported_dir: Path, many: str, tmp_path: Path) -> None:
    message = f"--valid-share 0.999: leaves none of the 200 rows of {many} to learn from; give a smaller one"
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        edgezo.tune(exported_dir, tmp_path / "run", data=many, valid_share=0.999, eval_rows=500, **FAST)
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_the_tokenizer_joins_with_the_word_is_refused(model: EdgeModel, many: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.text, "split", lambda prompt, completion: ([], [7]))  # as of a tokenizer without pieces
    with pytest.raises(DataError, match=r":1: the tokenizer joins the whole prompt with .terrible.+ a --template with more text"):
        split(model, many)


# what was understood of the rows


def test_the_rows_are_told_as_they_were_understood(model: EdgeModel, many: str, write_rows: Callable[..., str]) -> None:
    dataset, _ = split(model, many)
    great = sum(example.gold for example in dataset.train.examples)
    lines = data_summary(dataset, model.text)
    counts = re.fullmatch(r"170 rows of kind classification \((.+)\); 30 for validation", lines[0])
    assert counts is not None
    told = dict(re.findall(r"(\w+) (\d+)", counts[1]))
    assert told == {"great": str(great), "terrible": str(170 - great)}
    assert re.fullmatch(r"the first reads 'film \d+ is (great|long) It was' -> ' (great|terrible)'", lines[1])
    rows = write_rows([{"prompt": "the film " * 12, "completion": " is long" * 9}] * 2, "texts.jsonl")
    told = data_summary(split(model, rows, template=None, labels=None)[0], model.text)
    assert told[0] == "2 rows of kind completion"
    assert re.fullmatch(r"the first reads '\.\.\.[a-z ]{70}' -> '[a-z ]{40}\.\.\.'", told[1])
    text = write_rows([{"text": "the film is long"}] * 2, "plain.jsonl")
    assert data_summary(split(model, text, template=None, labels=None, directions=1, batch=1)[0], model.text) == []


def test_rows_of_one_label_alone_are_told(model: EdgeModel, write_rows: Callable[..., str]) -> None:
    rows = write_rows([{"text": f"film {number}", "label": 1} for number in range(3)], "one.jsonl")
    *_, last = data_summary(split(model, rows)[0], model.text)
    assert last == "warning: all training rows have the label 'great', so nothing is learned but to prefer it; give rows of others"
    rows = write_rows([{"text": f"film {number}", "label": number % 2} for number in range(4)], "two.jsonl")
    *_, last = data_summary(split(model, rows, labels="terrible,great,long,short")[0], model.text)
    assert last == "warning: no training row has the label 'long' or 'short'; check --labels and the rows"


def test_labels_beyond_ten_are_counted_together(model: EdgeModel, write_rows: Callable[..., str]) -> None:
    rows = write_rows([{"text": "a film", "label": f"word{chr(97 + number % 12)}"} for number in range(26)], "many.jsonl")
    (line, _) = data_summary(split(model, rows, labels=None)[0], model.text)
    assert line.startswith("26 rows of kind classification (worda 3, wordb 3, wordc 2")
    assert line.endswith(", 2 more)")


def test_what_an_encoder_reads_is_told(tmp_path: Path, write_rows: Callable[..., str]) -> None:
    rows = write_rows([{"text": "the film", "label": label} for label in (0, 1)], "two.jsonl")
    masked = EdgeModel(export_model(str(tiny_encoders.save(tmp_path / "source", "bert")), tmp_path / "bert").directory, threads=1)
    (_, line) = data_summary(split(masked, rows, template="{text} It was {mask} .", labels="bad,good")[0], masked.text)
    assert re.fullmatch(r"the first reads '.*the film.*' \[bad\] '.*'", line)


def test_a_length_beyond_the_context_is_told_once(exported_dir: Path, many: str, tmp_path: Path) -> None:
    notices: list[str] = []
    settings = {"threads": 1, "reporter": Reporter(notice=notices.append)}
    edgezo.tune(exported_dir, tmp_path / "run", data=many, steps=1, max_length=4096, valid_share=0.0, **{**FAST, **settings})
    assert notices[0] == "--max-length 4096: the model's context has 128 tokens, which holds instead"
    notices.clear()
    edgezo.tune(exported_dir, tmp_path / "run", resume=True, steps=2, **settings)
    assert [notice.split(",")[0] for notice in notices] == ["going on after step 1 of 2 (1 before)"]
