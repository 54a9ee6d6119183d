"""Learning in context: the prompts that are scored, what fits, which rows are drawn."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REVIEWS, Command

import edgezo
from edgezo.errors import ConfigError, DataError
from edgezo.runtime.data import Row
from edgezo.runtime.examples import make_examples
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.shots import add_shots, draw_shots
from edgezo.runtime.tasks import Task, find_task

LABELS = {"0": "bad", "1": "good"}
TRAIN: dict[str, list[dict[str, Any]]] = {
    "classification": [{"text": f"film {number}", "label": int(number < 9)} for number in range(12)],
    "choice": [{"prompt": f"film {number}", "choices": ["is good", "was bad"], "answer": number % 2} for number in range(12)],
    "answer": [{"prompt": f"film {number}?", "answer": ["good", "fine"]} for number in range(12)],
    "completion": [{"prompt": f"film {number}", "completion": "? good"} for number in range(12)],
    "preference": [{"prompt": "film", "chosen": "good", "rejected": "bad"}] * 4,
    "chat": [{"messages": [{"role": "user", "content": "film"}, {"role": "assistant", "content": "good"}]}] * 4,
    "text": [{"text": "a film"}] * 4,
}
WORKED = {  # the text of row number 0, and of the row to evaluate with each of its candidates
    "classification": ("film 0 It was good", ["a plot It was bad", "a plot It was good"]),
    "choice": ("film 0 is good", ["a plot is long", "a plot ends"]),
    "answer": ("film 0? good", ["a plot? long\n\n"]),
    "completion": ("film 0? good", ["a plot: long\n\n"]),
}
ROW: dict[str, dict[str, Any]] = {
    "classification": {"text": "a plot", "label": 0},
    "choice": {"prompt": "a plot", "choices": ["is long", "ends"], "answer": 1},
    "answer": {"prompt": "a plot?", "answer": "long"},
    "completion": {"prompt": "a plot", "completion": ": long"},
}


def make_rows(rows: list[dict[str, Any]], name: str = "train.jsonl") -> list[Row]:
    return [Row(fields, f"{name}:{number}") for number, fields in enumerate(rows, 1)]


def task_of_kind(kind: str, **settings: Any) -> Task:
    template, labels = ("{text} It was", LABELS) if kind == "classification" else (None, None)
    return find_task(make_rows(TRAIN[kind]), template, labels, "label", **settings)


def scored(model: EdgeModel, task: Task, row: dict[str, Any]) -> list[str]:
    """What a row's pairs are as text, special tokens left out."""
    (example,) = make_examples(make_rows([row]), task, model.text, model.context).examples
    return [model.text.decode([*prompt, *completion]) for prompt, completion in example.pairs]


@pytest.mark.parametrize("kind", WORKED)
def test_what_is_scored_is_the_shots_and_the_row(model: EdgeModel, kind: str) -> None:
    task, rows = task_of_kind(kind), make_rows([ROW[kind]])
    shots = draw_shots(make_rows(TRAIN[kind][:1]), task, 1, 0) + draw_shots(make_rows(TRAIN[kind]), task, 2, 3)
    worked, candidates = WORKED[kind]
    assert shots[0] == worked
    shown, used = add_shots(task, rows, shots, model.text, model.context)
    before = f"{shots[0]}\n\n{shots[1]}\n\n{shots[2]}\n\n"
    assert used == 3
    assert scored(model, shown, ROW[kind]) == [before + candidate for candidate in candidates]
    (example,) = make_examples(rows, shown, model.text, model.context).examples
    assert all(model.text.decode(prompt).startswith(before) for prompt, _ in example.pairs)  # the loss never covers a shot
    assert len({len(prompt) for prompt, _ in example.pairs}) == 1


def test_the_neutral_prompt_has_the_same_shots(model: EdgeModel) -> None:
    task = task_of_kind("classification", calibrate="N/A It was")
    shots = draw_shots(make_rows(TRAIN["classification"]), task, 2, 0)
    shown, _ = add_shots(task, make_rows([ROW["classification"]]), shots, model.text, model.context)
    before = f"{shots[0]}\n\n{shots[1]}\n\n"
    assert scored(model, shown, ROW["classification"]) == [
        *(before + candidate for candidate in WORKED["classification"][1]),
        *(f"{before}N/A It was {word}" for word in LABELS.values()),
    ]


def test_an_answers_own_end_stays(model: EdgeModel) -> None:
    task = task_of_kind("answer", stop="#")
    shown, _ = add_shots(task, make_rows([ROW["answer"]]), ["film? good"], model.text, model.context)
    assert scored(model, shown, ROW["answer"]) == ["film? good\n\na plot? long#"]


def test_shots_are_left_out_from_the_front_until_the_longest_row_fits(model: EdgeModel) -> None:
    task, kind = task_of_kind("classification"), "classification"
    shots = draw_shots(make_rows(TRAIN[kind]), task, 6, 1)
    rows = make_rows([ROW[kind], {"text": "a plot and a film and no end", "label": 1}, ROW[kind]])

    def tokens(count: int) -> int:
        before = "".join(f"{shot}\n\n" for shot in shots[len(shots) - count :])
        return len(model.text.encode(f"{before}a plot and a film and no end It was good"))

    for count in range(7):
        for limit, used in ((tokens(count), count), (tokens(count) - 1, max(count - 1, 0))):
            shown, found = add_shots(task, rows, shots, model.text, limit)
            assert found == used
            assert shown.prefix == "".join(f"{shot}\n\n" for shot in shots[len(shots) - used :])
            assert make_examples(rows, shown, model.text, limit).truncated == (limit < tokens(0))
    assert add_shots(task, rows, shots, model.text, tokens(0) - 1)[0] == task


def test_an_answer_keeps_room_to_be_written(model: EdgeModel) -> None:
    task, rows = task_of_kind("answer"), make_rows([ROW["answer"]])
    shots = draw_shots(make_rows(TRAIN["answer"]), task, 3, 0)
    prompt = len(model.text.encode("".join(f"{shot}\n\n" for shot in shots) + "a plot?"))
    assert add_shots(task, rows, shots, model.text, prompt + 20, room=20)[1] == 3
    assert add_shots(task, rows, shots, model.text, prompt + 19, room=20)[1] == 2


@pytest.mark.parametrize("kind", WORKED)
def test_shots_are_drawn_by_the_seed(kind: str) -> None:
    task, rows = task_of_kind(kind), make_rows(TRAIN[kind])
    drawn = {seed: tuple(draw_shots(rows, task, 4, seed)) for seed in range(6)}
    assert all(len(set(shots)) == 4 for shots in drawn.values())
    assert len(set(drawn.values())) == 6
    assert tuple(draw_shots(rows, task, 4, 5)) == drawn[5]
    assert sorted(draw_shots(rows, task, 12, 0)) == sorted(draw_shots(rows, task, 12, 1))


@pytest.mark.parametrize(("count", "bad"), [(2, 1), (4, 2), (5, (2, 3)), (6, 3), (8, 3), (12, 3)])
def test_shots_are_balanced_over_labels_as_far_as_rows_go(count: int, bad: Any) -> None:
    """Of the twelve rows three are bad."""
    task, rows = task_of_kind("classification"), make_rows(TRAIN["classification"])
    for seed in range(4):
        words = Counter(shot.split()[-1] for shot in draw_shots(rows, task, count, seed))
        assert words["bad"] in (bad if isinstance(bad, tuple) else (bad,))
        assert words.total() == count


@pytest.mark.parametrize("kind", ["preference", "chat", "text"])
def test_rows_without_prompt_and_answer_are_refused(kind: str) -> None:
    with pytest.raises(DataError) as caught:
        draw_shots(make_rows(TRAIN[kind]), task_of_kind(kind), 2, 0)
    assert str(caught.value) == (
        f"--shots: puts worked rows before a prompt, and rows of kind {kind} have no prompt and right answer; leave it out"
    )


@pytest.mark.parametrize("count", [0, -1, 13])
def test_a_number_of_shots_that_is_not_there_is_refused(count: int) -> None:
    with pytest.raises(ConfigError) as caught:
        draw_shots(make_rows(TRAIN["choice"]), task_of_kind("choice"), count, 0)
    assert str(caught.value) == f"--shots {count}: train.jsonl has 12 rows; give a number from 1 to 12"


def test_a_training_row_with_a_label_of_its_own_is_named() -> None:
    rows = [*TRAIN["classification"], {"text": "film", "label": 7}]
    with pytest.raises(DataError, match=r"^train.jsonl:13: label '7' is not among 0=bad, 1=good; "):
        draw_shots(make_rows(rows), task_of_kind("classification"), 2, 0)


TASK = ["--template", "{text} It was", "--labels", "terrible,great", "--threads", "1"]


@pytest.fixture
def train(write_rows: Callable[..., str]) -> str:
    return write_rows([{"text": text, "label": label} for text, label in REVIEWS], "train.jsonl")


def test_eval_tells_the_number_of_shots(exported_dir: Path, reviews: str, train: str, invoke: Command) -> None:
    shots = ["--shots", "2", "--train", train]
    code, out, err = invoke("eval", str(exported_dir), "--data", reviews, *TASK, *shots)
    first, second, *classes = out.splitlines()
    assert (code, second) == (0, f"shots  2 of {train}")
    assert err == f"warning: --train {train} has the very rows that are evaluated, so that a row may be its own example\n"
    assert first.startswith("base   accuracy ")
    assert [line.split()[0] for line in classes] == ["class", "0", "1"]
    zero = json.loads(invoke("eval", str(exported_dir), "--data", reviews, *TASK, "--json").out)
    found = json.loads(invoke("eval", str(exported_dir), "--data", reviews, *TASK, *shots, "--json").out)
    other = json.loads(invoke("eval", str(exported_dir), "--data", reviews, *TASK, *shots, "--seed", "1", "--json").out)
    assert (zero.get("shots"), found["shots"], found["truncated"]) == (None, 2, 0)
    assert len({part["loss"] for part in (zero, found, other)}) == 3
    few = invoke("eval", str(exported_dir), "--data", reviews, *TASK, "--shots", "16", "--train", train)
    last = few.out.splitlines()[1]
    assert last.endswith(f" of {train}; more of the 16 do not fit before the longest row")
    assert 0 < int(last.split()[1]) < 16


def test_shots_before_a_row_are_what_a_longer_prompt_is(exported_dir: Path, write_rows: Callable[..., str]) -> None:
    """The same text as shots and as a template of the test rows has the same loss."""
    train, row = [{"text": "the film", "label": 1}], [{"text": "a plot", "label": 0}]
    written = {"data": write_rows(row), "labels": "bad,good", "threads": 1}
    shown = edgezo.evaluate(exported_dir, shots=1, train=write_rows(train, "train.jsonl"), template="{text} It was", **written)
    plain = edgezo.evaluate(exported_dir, template="the film It was good\n\n{text} It was", **written)
    assert shown.evaluation == plain.evaluation
    assert (shown.shots, plain.shots) == (1, 0)


@pytest.mark.parametrize("given", [["--shots", "2"], ["--train", "rows.jsonl"]])
def test_shots_and_their_file_go_together(exported_dir: Path, reviews: str, invoke: Command, given: list[str]) -> None:
    message = "error: --shots and --train go together: how many worked rows to show, and the file they are drawn from; give both\n"
    assert invoke("eval", str(exported_dir), "--data", reviews, *TASK, *given) == (1, "", message)
