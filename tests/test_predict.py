"""Predictions of choices and answers are those that evaluations count; rows need neither right choice nor answer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command

import edgezo
from edgezo.config import Sampling, make_config
from edgezo.errors import ConfigError, DataError, EdgezoError, NonFiniteLossError
from edgezo.recipe import task_settings
from edgezo.runtime import batch_generate
from edgezo.runtime.batch_generate import generate_batch
from edgezo.runtime.data import Row
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.predict import Prediction, predict
from edgezo.runtime.scoring import Sequences
from edgezo.runtime.tasks import Task
from edgezo.runtime.text_metrics import best_of, exact_match, f1

CHOICES = [
    {"prompt": "the film is", "choices": ["great", "terrible and long", "a plot"], "answer": 1},
    {"prompt": "it was", "choices": ["the end of it", "good"], "answer": "good"},
    {"prompt": "the plot", "choices": ["is long", "was the film", "great"], "answer": 0},
]
COPA = [
    {"premise": "It rained.", "choice1": "We stayed at home.", "choice2": "We ran.", "question": question, "label": label}
    for question, label in (("effect", 0), ("cause", 1))
]
ANSWERS = [
    {"prompt": "the film is", "answer": ["great", "long"]},
    {"prompt": "a much longer prompt about the plot of the film, which is long and terrible, and it was", "answer": "the end"},
]
SHORT = {"max_tokens": 6, "threads": 1}

Write = Callable[..., str]


def without(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


def refusal(kind: type[EdgezoError], directory: Path, **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        edgezo.predict(directory, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# choices


def test_a_choice_is_the_one_of_the_largest_mean_log_probability(exported_dir: Path, write_rows: Write, model: EdgeModel) -> None:
    found = edgezo.predict(exported_dir, data=write_rows(without(CHOICES, "answer")), threads=1)
    for prediction, row in zip(found, CHOICES, strict=True):
        pairs = [model.text.split(row["prompt"], f" {choice}") for choice in row["choices"]]
        means = np.array([part.mean() for part in Sequences(model).log_probs(pairs)])
        expected = np.exp(means) / np.exp(means).sum()
        assert list(prediction.probabilities) == row["choices"]
        assert list(prediction.probabilities.values()) == pytest.approx(expected.tolist())
        assert (prediction.choice, prediction.text) == (int(means.argmax()), row["choices"][int(means.argmax())])
        assert prediction.label is None


@pytest.mark.parametrize("calibrate", [None, "N/A"])
def test_predicted_choices_are_those_eval_counts(calibrate: str | None, exported_dir: Path, write_rows: Write) -> None:
    rows = write_rows(CHOICES)
    found = edgezo.predict(exported_dir, data=rows, calibrate=calibrate, threads=1)
    right = [1, 1, 0]
    evaluated = edgezo.evaluate(exported_dir, rows, calibrate=calibrate, threads=1).evaluation
    assert evaluated.accuracy == pytest.approx(np.mean([row.choice == gold for row, gold in zip(found, right, strict=True)]))
    loss = edgezo.evaluate(exported_dir, rows, calibrate=calibrate, objective="cross-entropy", threads=1).evaluation.loss
    likely = [list(row.probabilities.values())[gold] for row, gold in zip(found, right, strict=True)]
    assert loss == pytest.approx(-np.log(likely).mean(), rel=1e-5)


def test_choices_of_a_recipe_are_told_on_the_command_line(exported_dir: Path, write_rows: Write, invoke: Command) -> None:
    data = write_rows(without(COPA, "label"))
    options = ["predict", str(exported_dir), "--task", "copa", "--data", data, "--threads", "1"]
    shown = json.loads(invoke(*options, "--json").out)["predictions"]
    texts = ["We stayed at home.", "We ran."]
    assert [list(row) for row in shown] == [["choice", "text", "probabilities", "truncated"]] * 2
    assert [row["text"] for row in shown] == [texts[row["choice"]] for row in shown]
    lines = invoke(*options).out.splitlines()
    for line, row in zip(lines, shown, strict=True):
        ranked = sorted(texts, key=lambda text: -row["probabilities"][text])
        assert line == "  ".join(f"{text} {100 * row['probabilities'][text]:.1f} %" for text in ranked)
    own = ["--template", "{premise} {question}", "--choices", "{choice1}", "--choices", "{choice2}"]
    replace = ["--replace", "question:effect=so,cause=because"]
    again = invoke("predict", str(exported_dir), "--data", data, *own, *replace, "--threads", "1", "--json")
    assert json.loads(again.out)["predictions"] == shown


def test_the_calibration_of_a_run_can_be_taken_off(exported_dir: Path, tmp_path: Path, write_rows: Write) -> None:
    rows = write_rows(CHOICES)
    edgezo.tune(exported_dir, tmp_path / "run", data=rows, calibrate="N/A", steps=1, batch=2, threads=1)
    settings: dict[str, Any] = {"data": rows, "run": tmp_path / "run", "step": 0, "threads": 1}
    plain = edgezo.predict(exported_dir, data=rows, threads=1)
    kept, off = edgezo.predict(exported_dir, **settings), edgezo.predict(exported_dir, calibrate="", **settings)
    for own, other, calibrated in zip(off, plain, kept, strict=True):
        assert own.probabilities == pytest.approx(other.probabilities, rel=1e-4)
        assert own.probabilities != pytest.approx(calibrated.probabilities, rel=1e-2)


def test_the_ending_of_a_recipe_can_be_taken_off(exported_dir: Path, write_rows: Write) -> None:
    settings = {"data": write_rows(ANSWERS), "answer_field": "answer", "max_tokens": 8, "threads": 1}
    plain = edgezo.predict(exported_dir, **settings)
    assert edgezo.predict(exported_dir, stop="", **settings) == plain
    assert make_config(None, {"data": "a", "stop": ""}, task=task_settings("squad")).stop is None
    assert make_config(None, {"data": "a"}, task=task_settings("squad")).stop == "\n"


def test_a_run_of_choices_reads_rows_as_it_learned_them(exported_dir: Path, tmp_path: Path, write_rows: Write, invoke: Command) -> None:
    options = ["--task", "copa", "--data", write_rows(COPA), "--steps", "1", "--batch", "2", "--threads", "1"]
    told = invoke("tune", str(exported_dir), "-o", str(tmp_path / "run"), *options).out
    assert f"use it  edgezo predict {exported_dir} --run {tmp_path / 'run'} --data ROWS\n" in told
    data = write_rows(without(COPA, "label"))
    found = edgezo.predict(exported_dir, data=data, run=tmp_path / "run", step=0, threads=1)
    base = edgezo.predict(exported_dir, data=data, task="copa", threads=1)
    for own, other in zip(found, base, strict=True):  # weights of a run lie on a grid
        assert (own.choice, own.text) == (other.choice, other.text)
        assert own.probabilities == pytest.approx(other.probabilities, rel=1e-5)


# answers


@pytest.mark.parametrize("stop", [None, " "])
def test_answers_are_those_eval_measures(stop: str | None, exported_dir: Path, write_rows: Write) -> None:
    found = edgezo.predict(exported_dir, data=write_rows(without(ANSWERS, "answer"), "asked.jsonl"), stop=stop, **SHORT)
    model = EdgeModel(exported_dir, threads=1)
    alone = [model.generate(row["prompt"], max_tokens=6) for row in ANSWERS]
    assert [row.text for row in found] == [(text if stop is None else text.split(stop)[0]).strip() for text in alone]
    assert [(row.label, row.choice, dict(row.probabilities)) for row in found] == [(None, None, {})] * 2
    right = [{**row, "answer": [text.text or "none", "it"]} for row, text in zip(ANSWERS, found, strict=True)]
    evaluated = edgezo.evaluate(exported_dir, write_rows(right), stop=stop, **SHORT).evaluation
    golds = [row["answer"] for row in right]
    for name, metric in (("f1", f1), ("exact_match", exact_match)):
        mean = np.mean([best_of(metric, row.text or "", gold) for row, gold in zip(found, golds, strict=True)])
        assert evaluated.others[name] == pytest.approx(mean)


def test_answers_of_a_recipe_are_told_on_the_command_line(exported_dir: Path, write_rows: Write, invoke: Command) -> None:
    rows = [{"title": "Rain", "context": "It rained.", "question": question} for question in ("What?", "When?")]
    options = ["predict", str(exported_dir), "--task", "squad", "--data", write_rows(rows), "--max-tokens", "5", "--threads", "1"]
    shown = json.loads(invoke(*options, "--json").out)["predictions"]
    assert [list(row) for row in shown] == [["text", "truncated"]] * 2
    assert invoke(*options).out == "".join(" ".join(row["text"].split()) + "\n" for row in shown)
    model, template = EdgeModel(exported_dir, threads=1), task_settings("squad")["template"]
    assert shown[0]["text"] == model.generate(template.format(**rows[0]), max_tokens=5).split("\n")[0].strip()


def test_a_run_of_answers_answers_prompts(exported_dir: Path, tmp_path: Path, write_rows: Write, invoke: Command) -> None:
    run = tmp_path / "run"
    edgezo.tune(exported_dir, run, data=write_rows(ANSWERS), steps=1, batch=2, max_tokens=4, threads=1)
    data = write_rows(without(ANSWERS, "answer"))
    found = edgezo.predict(exported_dir, data=data, run=run, threads=1)
    assert found == edgezo.predict(exported_dir, texts=[row["prompt"] for row in ANSWERS], run=run, threads=1)
    model = EdgeModel(exported_dir, threads=1, run=run)
    assert [row.text for row in found] == [model.generate(row["prompt"], max_tokens=4).strip() for row in ANSWERS]
    told = invoke("predict", str(exported_dir), "--run", str(run), "--text", "the film is", "--threads", "1")
    assert told == (0, " ".join((found[0].text or "").split()) + "\n", "")


def test_a_run_with_a_template_answers_rows_without_answer(exported_dir: Path, tmp_path: Path, write_rows: Write) -> None:
    rows = [{"question": "who", "answer": "me"}, {"question": "what", "answer": "a film"}]
    settings = {"template": "Q: {question} A:", "max_tokens": 3, "threads": 1}
    edgezo.tune(exported_dir, tmp_path / "run", data=write_rows(rows), answer_field="answer", steps=1, batch=2, start="none", **settings)
    found = edgezo.predict(exported_dir, texts=["who"], run=tmp_path / "run", step=0, threads=1)
    assert found == edgezo.predict(exported_dir, texts=["who"], answer_field="answer", **settings)
    assert found[0].text is not None


def test_completions_and_preferences_are_answered_too(exported_dir: Path, write_rows: Write) -> None:
    prompts = [row["prompt"] for row in ANSWERS]
    plain = edgezo.predict(exported_dir, data=write_rows([{"prompt": prompt} for prompt in prompts]), **SHORT)
    for more in ({"completion": " it"}, {"chosen": "a", "rejected": "b"}):
        rows = write_rows([{"prompt": prompt, **more} for prompt in prompts])
        assert edgezo.predict(exported_dir, data=rows, **SHORT) == plain


def test_a_long_prompt_leaves_room_for_its_answer(exported_dir: Path, write_rows: Write) -> None:
    model = EdgeModel(exported_dir, threads=1)
    text = "the film is long and " * 60
    (found,) = edgezo.predict(exported_dir, data=write_rows([{"prompt": text}]), max_length=20, **SHORT)
    tokens = model.text.encode(text)
    assert len(tokens) > 100
    kept = [*tokens[:1], *tokens[-13:]] if tokens[0] == model.text.facts.bos_token_id else tokens[-14:]
    assert found == Prediction(text=generate_batch(model, [kept], 6)[0], truncated=True)
    assert found.as_dict() == {"text": found.text, "truncated": True}


def test_no_answer_is_empty(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    end, blank, *words = (
        model.manifest.tokenizer.eos_token_ids[0],
        *(model.text.encode(text, special=False)[-1] for text in ("\n", "x", "q")),
    )
    logits = np.zeros((2, model.manifest.origin.vocab_size), np.float32)
    logits[:, [end, blank, *words]] = [4, 3, 2, 1]
    monkeypatch.setattr(batch_generate, "forward", lambda model, batch, *others: (logits[: len(batch.ids)], {}))
    for stop, expected in ((None, words[0]), ("\n", words[0]), (model.text.decode(words[:1]), words[1])):
        assert generate_batch(model, [[5, 6], [7]], 3, stop) == [model.text.decode([expected]).strip()] * 2
        assert [text for _, text in batch_generate.continue_batch(model, [[5, 6], [7]], 3, stop)] == ["", ""]


# written to a file


def test_rows_are_written_with_their_predictions(exported_dir: Path, write_rows: Write, invoke: Command, tmp_path: Path) -> None:
    rows = [{"id": 7, "text": "the film"}, {"id": 8, "text": "a plöt", "half": "\ud800"}]
    task = ["--template", "{text} It was", "--labels", "terrible,great", "--threads", "1"]
    asked = ["predict", str(exported_dir), "--data", write_rows(rows), *task]
    plain = json.loads(invoke(*asked, "--json").out)["predictions"]
    path = tmp_path / "predicted.jsonl"
    found = invoke(*asked, "-o", str(path))
    assert (found.code, found.out) == (0, f"written  {path}\nrows     2\n")
    written = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert written == [{**row, "prediction": prediction} for row, prediction in zip(rows, plain, strict=True)]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("rows.jsonl", "exists already; choose another file or remove it"),
        ("empty.jsonl", "exists already; choose another file or remove it"),
        ("none/file.jsonl", "there is no folder {parent}; make it or choose another file"),
        ("file.csv", "rows are written as .jsonl; name the file so"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_predicted(
    exported_dir: Path, write_rows: Write, invoke: Command, tmp_path: Path, name: str, problem: str
) -> None:
    data, path = write_rows([{"text": "the film"}]), tmp_path / name
    (tmp_path / "empty.jsonl").mkdir()
    found = invoke("predict", str(exported_dir), "--data", data, "--template", "{nothing}", "--labels", "a,b", "-o", str(path))
    asked = f"-o {path}" if name.endswith(".csv") else path
    assert (found.code, found.err) == (1, f"error: {asked}: {problem.format(parent=path.parent)}\n")


def test_a_prediction_overwrites_no_field_and_needs_rows(exported_dir: Path, write_rows: Write, invoke: Command, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    data = write_rows([{"text": "a film"}, {"text": "the film", "prediction": 1}])
    found = invoke("predict", str(exported_dir), "--data", data, "-o", str(path))
    assert found.err == f"error: {data}:2: has a field 'prediction', which -o writes; rename it\n"
    found = invoke("predict", str(exported_dir), "--text", "a film", "-o", str(path))
    assert found.err == f"error: -o {path}: writes rows with their predictions; give them with --data\n"
    assert not path.exists()


# draws


def test_answers_are_drawn_by_seed_and_row(exported_dir: Path, write_rows: Write, model: EdgeModel) -> None:
    rows = write_rows(without(ANSWERS, "answer"))

    def answers(**sampling: Any) -> list[str | None]:
        return [found.text for found in edgezo.predict(exported_dir, data=rows, sampling=Sampling(**sampling), **SHORT)]

    greedy = [found.text for found in edgezo.predict(exported_dir, data=rows, **SHORT)]
    assert answers(temperature=1e-6) == answers(top_k=1) == greedy
    assert answers(seed=1) == answers(seed=1)
    assert len({tuple(answers(seed=seed)) for seed in range(4)}) == 4
    prompts = [[5, 6, 7]] * 3
    drawn = generate_batch(model, prompts, 6, sampling=Sampling(seed=2))
    assert len(set(drawn)) == 3
    assert generate_batch(model, prompts, 6, batch_tokens=1, sampling=Sampling(seed=2)) == drawn


def test_an_evaluation_may_draw_its_answers(exported_dir: Path, write_rows: Write) -> None:
    drawn = edgezo.predict(exported_dir, data=write_rows(without(ANSWERS, "answer")), sampling=Sampling(seed=3), **SHORT)
    data = write_rows([{**row, "answer": found.text} for row, found in zip(ANSWERS, drawn, strict=True)])
    losses, matches = set(), []
    for sampling in (Sampling(seed=3), Sampling(seed=4), None):
        found = edgezo.evaluate(exported_dir, data, sampling=sampling, objective="exact-match", **SHORT).evaluation
        losses.add(found.loss)
        matches.append(found.others["exact_match"])
    assert matches == [1.0, 0.0, 0.0]
    assert len(losses) == 1


@pytest.mark.parametrize("call", ["predict", "evaluate"])
def test_draws_without_a_written_answer_are_refused(exported_dir: Path, write_rows: Write, call: str) -> None:
    data = write_rows(CHOICES)
    given = {"sampling": Sampling(temperature=0.5), "threads": 1}
    with pytest.raises(ConfigError, match=r"draw written answers, and for rows of kind choice none are written here; leave them out$"):
        edgezo.predict(exported_dir, data=data, **given) if call == "predict" else edgezo.evaluate(exported_dir, data, **given)


def test_draws_out_of_range_are_refused(exported_dir: Path, write_rows: Write) -> None:
    data, given = write_rows(ANSWERS), {"sampling": Sampling(temperature=-1.0), **SHORT}
    for call in (
        lambda: edgezo.predict(exported_dir, data=data, **given),
        lambda: edgezo.evaluate(exported_dir, data, objective="f1", **given),
    ):
        with pytest.raises(ConfigError, match="temperature must be above 0"):
            call()


# refusals


def test_what_is_not_said_is_refused(exported_dir: Path, write_rows: Write) -> None:
    rows = write_rows([{"question": "who"}])
    assert refusal(ConfigError, exported_dir, data=rows, template="{question}") == (
        "--template '{question}': what continues it is not said; give --labels of classes, --choices, or --answer-field for a generated answer"
    )
    assert refusal(ConfigError, exported_dir, texts=["a"], labels="x,y") == (
        "a text fills a template; give --template with --labels, --choices or --answer-field, or a --run or --task"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "no field 'prompt'; it has 'messages'"),
        ({"text": "a film", "place": "b"}, "no field 'prompt'; it has 'text', 'place'"),
    ],
)
def test_rows_without_a_prompt_are_refused(row: dict[str, Any], message: str, exported_dir: Path, write_rows: Write) -> None:
    path = write_rows([row])
    expected = f"{path}:1: {message}, give --template (messages are answered by edgezo generate --chat)"
    assert refusal(DataError, exported_dir, data=path) == expected


def test_choices_without_a_list_are_refused(exported_dir: Path, write_rows: Write) -> None:
    path = write_rows([{"prompt": "a", "choices": ["b", "c"]}, {"prompt": "a", "choices": "b"}])
    assert refusal(DataError, exported_dir, data=path) == f"{path}:2: field 'choices' must be a list of at least two texts"


def test_scores_that_are_not_finite_are_refused(model: EdgeModel, write_rows: Write) -> None:
    model.weights["model.norm.weight"][3] = np.nan
    with pytest.raises(
        NonFiniteLossError, match=r"^the model gives no finite scores; export the model again, or tune with a smaller --lr$"
    ):
        predict(model, [Row(CHOICES[0], "row 1")], Task("choice"), 64)
