"""Task recipes: every one of the package runs, options override them, and what is wrong with one is told in a line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

import edgezo
from edgezo.config import ADAPTER_DEFAULTS, TASK_SETTINGS, TuneConfig, make_config
from edgezo.errors import ConfigError
from edgezo.recipe import RECIPES, read_recipe, recipe_names, recipe_path, summarize, task_settings
from edgezo.runtime.data import Row
from edgezo.runtime.dataset import task_of
from edgezo.runtime.examples import gold_of, worked_text
from edgezo.runtime.run import read_run

NLI = {"premise": "The film is long.", "hypothesis": "The film ends late."}
ROWS: dict[str, list[dict[str, Any]]] = {  # two of every recipe, made up; labels in the spellings that are around
    "sst2": [{"sentence": "a fine film ", "label": 1}, {"sentence": "no plot ", "label": "negative"}],
    "sst5": [{"text": "it is fine", "label": 3}, {"text": "no plot", "label": "very negative"}],
    "trec": [{"question": "Who made it ?", "label": "human"}, {"question": "How many ?", "label": 5}],
    "rte": [{**NLI, "label": "entailment"}, {**NLI, "label": 1}],
    "cb": [{**NLI, "label": "contradiction"}, {**NLI, "label": 2}],
    "boolq": [{"passage": "It is long.", "question": "is it long", "label": label} for label in (True, 0)],
    "wic": [{"word": "cut", "sentence1": "A cut.", "sentence2": "The last cut.", "label": label} for label in (False, "1")],
    "wsc": [{"text": "Ann saw Bo as she ran.", "span1_text": "Ann", "span2_text": "she", "label": label} for label in (1, "false")],
    "copa": [
        {"premise": "It rained.", "choice1": "We stayed.", "choice2": "We ran.", "question": question, "label": label}
        for question, label in (("effect", 0), ("cause", "1"))
    ],
    "multirc": [{"paragraph": "It rained.", "question": "Was it wet?", "answer": "yes", "label": label} for label in (1, 0)],
    "record": [{"prompt": "Ann met Bo.\n-", "choices": ["Ann was met.", "Bo was met."], "answer": answer} for answer in ("Bo was met.", 1)],
    "squad": [
        {"title": "Rain", "context": "It rained.", "question": "What?", "answers": answers}
        for answers in (["rain", "it rained"], {"text": ["rain"], "answer_start": [3]})
    ],
    "drop": [
        {"passage": "Two and one.", "question": "How many?", "answers_spans": answers} for answers in (["3"], {"spans": ["3"], "types": []})
    ],
    "mnli": [{**NLI, "label": 0}, {**NLI, "label": "neutral"}],
    "snli": [{**NLI, "label": 2}, {**NLI, "label": "entailment"}],
    "agnews": [{"text": "They won.", "label": 1}, {"text": "A new chip.", "label": "Sci/Tech"}],
}
PROMPTED = {  # the first of the rows with its right answer
    "sst2": "a fine film  It was great",
    "sst5": "it is fine It was good",
    "trec": "Who made it ?\nThe answer is a kind of person",
    "rte": 'The film is long.\nDoes this mean that "The film ends late." is true? Yes or No?\nYes',
    "cb": 'Suppose The film is long. Can we infer that "The film ends late."? Yes, No, or Maybe?\nNo',
    "boolq": "It is long. is it long?\nYes",
    "wic": 'Does the word "cut" have the same meaning in these two sentences? Yes, No?\nA cut.\nThe last cut.\nNo',
    "wsc": 'Ann saw Bo as she ran.\nIn the previous sentence, does the pronoun "she" refer to Ann? Yes or No?\nYes',
    "copa": "It rained. so We stayed.",
    "multirc": 'It rained.\nQuestion: Was it wet?\nI found this answer "yes". Is that correct? Yes or No?\nYes',
    "record": "Ann met Bo.\n- Bo was met.",
    "squad": "Title: Rain\nContext: It rained.\nQuestion: What?\nAnswer: rain",
    "drop": "Passage: Two and one.\nQuestion: How many?\nAnswer: 3",
    "mnli": 'The film is long.\nDoes this mean that "The film ends late." is true? Yes, No, or Maybe?\nYes',
    "snli": 'The film is long.\nDoes this mean that "The film ends late." is true? Yes, No, or Maybe?\nNo',
    "agnews": "They won.\nTopic: Sports",
}
SECOND = {"sst2": 0, "sst5": 0, "trec": 5, "rte": 1, "cb": 2, "boolq": 0, "wic": 1, "wsc": 0, "copa": 1, "multirc": 0, "record": 1}
SECOND |= {"squad": 0, "drop": 0, "mnli": 1, "snli": 0, "agnews": 3}
OWN = """name: mine
description: films
fields: [text, label]
settings:
  template: "{text} It was"
  labels: {0: bad, 1: good}
  max_length: 40
"""


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe of one's own; returns its path."""

    def write(text: str = OWN, name: str = "my.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(task: str | Path) -> str:
    """The message of the error, which is one line."""
    with pytest.raises(ConfigError) as caught:
        task_settings(task)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_there_are_rows_for_every_recipe() -> None:
    assert set(recipe_names()) == set(ROWS) == set(PROMPTED) == set(SECOND)


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_reads_rows_as_it_says(name: str) -> None:
    recipe = read_recipe(recipe_path(name))
    assert recipe.name == name
    assert set(recipe.fields) == set(ROWS[name][0])
    rows = [Row(fields, f"rows.jsonl:{number}") for number, fields in enumerate(ROWS[name], 1)]
    task = task_of(rows, make_config(None, {"data": "x"}, task=recipe.settings))
    assert task.kind == summarize(recipe).kind
    assert worked_text(rows[0], task) == PROMPTED[name]
    assert gold_of(rows[1], task) == SECOND[name]


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_tunes_and_evaluates(exported_dir: Path, tmp_path: Path, write_rows: Callable[..., str], name: str) -> None:
    data, run = write_rows(ROWS[name]), tmp_path / "run"
    result = edgezo.tune(
        exported_dir, run, task=name, data=data, valid=data, steps=1, start="none", batch=2, eval_every=1, max_tokens=4, threads=1
    )
    assert result.best is not None
    kept = json.loads((run / "config.json").read_text(encoding="utf-8"))
    assert "task" not in kept
    assert {key: kept[key] for key in ("template", "choices", "answer_field", "stop")} == {
        key: task_settings(name).get(key) for key in ("template", "choices", "answer_field", "stop")
    }
    found = edgezo.evaluate(exported_dir, data, task=name, max_tokens=4, threads=1).evaluation
    assert found.as_dict() == pytest.approx(read_run(run).evaluations[0].as_dict(), rel=1e-5, abs=1e-5)
    last = edgezo.evaluate(exported_dir, data, run=run, step=1, threads=1).evaluation  # as the run reads rows
    assert last.as_dict() == pytest.approx(read_run(run).evaluations[1].as_dict(), rel=1e-5, abs=1e-5)
    assert ("f1" in found.others) == (summarize(read_recipe(recipe_path(name))).kind == "answer")


def test_defaults_then_adapter_then_task_then_file_then_options(own: Callable[..., Path]) -> None:
    file = own("data: x\ntemplate: '{text} of the file'\nmax_length: 30\neps: 0.5\n", "run.yaml")
    task = {"template": "of the task", "max_length": 20, "max_tokens": 9, "label_field": "of the task"}
    config = make_config(file, {"max_length": 10}, "lora", task)
    assert (config.label_field, config.template, config.max_length, config.max_tokens) == ("of the task", "{text} of the file", 10, 9)
    assert (config.batch, config.eps, config.seed) == (ADAPTER_DEFAULTS["lora"]["batch"], 0.5, TuneConfig.model_fields["seed"].default)


def test_options_override_a_task_on_the_command_line(
    exported_dir: Path, tmp_path: Path, write_rows: Callable[..., str], own: Callable[..., Path], invoke: Command
) -> None:
    data = write_rows([{"text": "a film", "label": 0}, {"text": "no film", "label": 1}])
    config = own("steps: 1\nlabel_field: none\nmax_length: 30\n", "run.yaml")
    options = ["--task", str(own()), "--config", str(config), "--label-field", "label", "--labels", "dull,fine", "--data", data]
    done = invoke("tune", str(exported_dir), "-o", str(tmp_path / "run"), *options, "--threads", "1")
    assert done.code == 0, done.err
    kept = read_run(tmp_path / "run").config
    assert (kept.template, kept.labels, kept.label_field, kept.max_length) == ("{text} It was", {"0": "dull", "1": "fine"}, "label", 30)
    seen = invoke("predict", str(exported_dir), "--task", str(own()), "--text", "a film", "--json").out
    assert set(json.loads(seen)["predictions"][0]["probabilities"]) == {"0", "1"}
    assert "accuracy" in invoke("eval", str(exported_dir), "--task", str(own()), "--data", data).out


def test_a_task_stands_in_place_of_the_runs_own_reading(exported_dir: Path, tmp_path: Path, write_rows: Callable[..., str]) -> None:
    rows = [{"prompt": "the film", "choices": ["is long", "was short"], "answer": 0, "sentence": "a film", "label": 1}] * 2
    data, run = write_rows(rows), tmp_path / "run"
    edgezo.tune(exported_dir, run, task="record", data=data, steps=1, batch=2, threads=1)
    assert edgezo.evaluate(exported_dir, data, run=run, threads=1).evaluation.macro_f1 is None
    assert edgezo.evaluate(exported_dir, data, run=run, task="sst2", threads=1).evaluation.macro_f1 is not None


def test_a_run_that_resumes_takes_no_task(exported_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        edgezo.tune(exported_dir, tmp_path / "run", resume=True, task="sst2")
    assert str(caught.value) == "--resume continues with the run's own settings; leave --task sst2 out"


COARSE = ["abbreviation", "description", "entity", "human", "location", "number"]


@pytest.mark.parametrize(
    ("task", "labels", "classes"),
    [
        ("sst2", ["positive", "negative"], ["negative", "positive"]),
        ("sst2", [1, 0], ["negative", "positive"]),
        ("trec", ["HUM", "NUM"], ["abbreviation", "description", "entity", "HUM", "location", "NUM"]),
        ("trec", [3, 5], COARSE),
        ("boolq", ["true", 0], ["False", "true"]),
    ],
)
def test_predictions_name_a_class_as_the_training_data_does_or_in_words(
    task: str, labels: list[Any], classes: list[str], exported_dir: Path, tmp_path: Path, write_rows: Callable[..., str]
) -> None:
    rows = [{**ROWS[task][0], "label": label} for label in labels]
    edgezo.tune(exported_dir, tmp_path / "run", task=task, data=write_rows(rows), steps=1, batch=2, threads=1)
    unlabelled = write_rows([{name: value for name, value in rows[0].items() if name != "label"}])
    (found,) = edgezo.predict(exported_dir, data=unlabelled, run=tmp_path / "run", threads=1)
    assert sorted(found.probabilities) == sorted(classes)
    assert sum(found.probabilities.values()) == pytest.approx(1)
    assert found.label == max(classes, key=lambda name: found.probabilities[name])


KNOWN = "agnews, boolq, cb, copa, drop, mnli, multirc, record, rte, snli, squad, sst2, sst5, trec, wic, wsc"


@pytest.mark.parametrize("name", ["imdb", "SST2", "../recipes/sst2", ""])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    assert refusal(name) == f"--task {name}: no such task; there are {KNOWN}, or give a .yaml file"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: mine", "name: mine\nlr: 1", "lr: no such setting; the settings are name, description, fields, settings"),
        ("description: films\n", "", "description: not given; it is needed"),
        ("description: films", 'description: ""', "description '': string should have at least 1 character"),
        ("fields: [text, label]", "fields: []", "fields []: list should have at least 1 item after validation, not 0"),
        ("max_length: 40", "max_length: 1", "settings: max_length 1: input should be greater than 1"),
        ("max_length: 40", "lr: 0.1", f"settings: lr: no setting of a task; these are {', '.join(TASK_SETTINGS)}"),
        ("max_length: 40", "objective: low", "settings: --objective low: give likelihood, "),
        ("max_length: 40", "stop: '#'", "settings: --stop: ends an answer, and rows of kind classification have none; leave it out"),
        (
            "{0: bad, 1: good}",
            "{no: bad, yes: good}",
            "settings: --labels {False: 'bad', True: 'good'}: YAML reads yes, no, on and off as ",
        ),
        (
            "[text, label]",
            "[body, label]",
            "settings: --template '{text} It was': field 'text' does not exist; its rows has 'body', 'label'",
        ),
        ("{text} It", "{text It", "settings: --template '{text It was': "),
        ("name: mine", "name: [mine", "not readable as YAML ("),
    ],
)
def test_what_is_wrong_with_a_recipe_is_told(own: Callable[..., Path], old: str, new: str, message: str) -> None:
    assert old in OWN
    path = own(OWN.replace(old, new))
    assert refusal(path).startswith(f"{path}: {message}")


def test_a_recipe_that_is_not_there_is_told(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    assert refusal(path) == f"--task {path}: no such file; give a recipe of yours, or a name that `edgezo tasks` lists"


def test_labels_that_are_words_need_no_list(own: Callable[..., Path]) -> None:
    assert "labels" not in task_settings(own(OWN.replace("  labels: {0: bad, 1: good}\n", "")))


TABLE = """\
agnews   classification  accuracy         topic of news, four classes (AG News, Zhang et al. 2015)
boolq    classification  accuracy         yes or no questions about a passage (BoolQ, Clark et al. 2019, as in SuperGLUE)
cb       classification  accuracy         is a clause implied, denied or left open (CommitmentBank, de Marneffe et al. 2019, as in SuperGLUE)
copa     choice          accuracy         the likelier cause or effect of two (COPA, Roemmele et al. 2011, as in SuperGLUE)
drop     answer          f1, exact-match  questions about a passage that need counting and comparing (DROP, Dua et al. 2019)
mnli     classification  accuracy         does one sentence follow from another, three classes, many genres (MNLI, Williams et al. 2018)
multirc  classification  accuracy         is an answer to a question about a paragraph right (MultiRC, Khashabi et al. 2018, as in SuperGLUE)
record   choice          accuracy         the entity missing in a sentence about a passage (ReCoRD, Zhang et al. 2018, as in SuperGLUE; rows as prompt, choices, answer)
rte      classification  accuracy         does one sentence follow from another (RTE, Dagan et al. 2005, as in GLUE and SuperGLUE)
snli     classification  accuracy         does one sentence follow from another, three classes (SNLI, Bowman et al. 2015; leave out rows labelled -1)
squad    answer          f1, exact-match  questions about a paragraph, answered by words of it (SQuAD, Rajpurkar et al. 2016)
sst2     classification  accuracy         sentiment of film reviews, two classes (SST-2, Socher et al. 2013, as in GLUE)
sst5     classification  accuracy         sentiment of film reviews, five classes (SST-5, Socher et al. 2013)
trec     classification  accuracy         what a question asks for, six classes (TREC, Li and Roth 2002)
wic      classification  accuracy         does a word have one meaning in two sentences (WiC, Pilehvar and Camacho-Collados 2019, as in SuperGLUE)
wsc      classification  accuracy         what a pronoun refers to (WSC, Levesque et al. 2012, as in SuperGLUE)
"""


def test_tasks_are_listed(invoke: Command) -> None:
    assert invoke("tasks") == (0, TABLE, "")
    listed = json.loads(invoke("tasks", "--json").out)["tasks"]
    assert [task["name"] for task in listed] == recipe_names()
    assert listed[3] == dict(zip(("name", "kind", "metric", "description"), summarize(read_recipe(RECIPES / "copa.yaml")), strict=True))


def test_a_task_is_printed_as_it_is(invoke: Command, own: Callable[..., Path]) -> None:
    assert invoke("tasks", "copa") == (0, (RECIPES / "copa.yaml").read_text(encoding="utf-8"), "")
    assert invoke("tasks", str(own())) == (0, OWN, "")
    assert json.loads(invoke("tasks", "copa", "--json").out)["settings"]["choices"] == ["{choice1}", "{choice2}"]
    assert invoke("tasks", "imdb") == (1, "", f"error: edgezo tasks imdb: no such task; there are {KNOWN}, or give a .yaml file\n")


def test_recipes_of_the_benches_can_be_read() -> None:
    found = {path.stem: summarize(read_recipe(path)).kind for path in Path(__file__).resolve().parent.parent.glob("examples/bench/*.yaml")}
    assert found == {"sms_spam": "classification", "e2e_nlg": "answer"}
