"""The exact start solves what scikit-learn solves, changes the rows of the label words alone, and goes wherever a run goes."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_encoders
import torch
import transformers
from reference import edge_log_probs, make_pairs, network_log_probs, peft_network, randomise, write_adapter
from sklearn.linear_model import LogisticRegression

import edgezo
from edgezo.config import make_config
from edgezo.errors import AdapterError, ConfigError, EdgeModelError, RunError
from edgezo.runtime import exact_start, head_rows, softmax_fit
from edgezo.runtime.dataset import read_dataset
from edgezo.runtime.examples import Example, Offsets
from edgezo.runtime.head_rows import NO_ROWS, HeadRows, summed
from edgezo.runtime.journal import Journal
from edgezo.runtime.journal_reader import read_journal
from edgezo.runtime.journal_records import evaluation_records, head_record, offsets_record
from edgezo.runtime.label_start import first_tokens, read_features
from edgezo.runtime.lbfgs import minimize
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.objective import Objective
from edgezo.runtime.peft_folder import write_peft
from edgezo.runtime.reports import Reporter
from edgezo.runtime.scoring import Classified, Sequences
from edgezo.runtime.softmax_fit import Turned, fit_softmax, held_out
from edgezo.runtime.tuned import write_tuned
from edgezo.storage import sha256_file

PLACES = ["the film", "a plot", "the end", "a song", "this book", "the cat", "one meal", "my day", "the sea", "a hat", "the plan", "he"]
ROWS = [{"text": f"{place} is {('terrible', 'great')[label]}", "label": label} for place in PLACES for label in (0, 1)]
TASK: dict[str, Any] = {"template": "{text} It was", "labels": "terrible,great", "threads": 1}
FEW: dict[str, Any] = {"steps": 3, "directions": 4, "batch": 2, "schedule": "constant", "eval_every": 2}


@pytest.fixture
def rows(write_rows: Callable[..., str]) -> str:
    """Rows whose last word tells their label."""
    return write_rows(ROWS)


def tuned_run(directory: Path, run: Path, rows: str, **settings: Any) -> Any:
    return edgezo.tune(directory, run, data=rows, valid=rows, **{**TASK, **FEW, **settings})


def only(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Exact starts of one kind, whichever promises more."""
    every = exact_start.label_fits
    monkeypatch.setattr(exact_start, "label_fits", lambda *given: (fit for fit in every(*given) if fit.name.startswith(kind)))


# the solution


def test_lbfgs_finds_the_minimum_of_a_quadratic() -> None:
    random = np.random.default_rng(0)
    root, aim = random.normal(size=(30, 30)), random.normal(size=30)
    matrix = root @ root.T + np.eye(30)
    found = minimize(lambda x: (0.5 * x @ matrix @ x - aim @ x, matrix @ x - aim), np.zeros(30), tolerance=1e-14)
    assert np.abs(found - np.linalg.solve(matrix, aim)).max() < 1e-5


@pytest.mark.parametrize(("count", "width"), [(60, 8), (12, 40)])
def test_the_fit_is_that_of_scikit_learn(count: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without scores of the base and without a constant the problem is multinomial logistic regression, C = 1 / (n * penalty)."""
    random = np.random.default_rng(1)
    states, gold = random.normal(size=(count, width)), np.arange(count) % 3
    states[:, 0] += gold
    monkeypatch.setattr(softmax_fit, "PENALTIES", (0.05,))
    monkeypatch.setattr(softmax_fit, "TOLERANCE", 1e-10)
    found = fit_softmax(states, np.zeros((count, 3)), gold)
    scale = np.sqrt((states**2).mean(axis=0))
    reference = LogisticRegression(C=1 / (count * 0.05), fit_intercept=False, tol=1e-10, max_iter=10_000).fit(states / scale, gold)
    assert np.abs((found.weights * scale[:, None]).T - reference.coef_).max() < 1e-4
    assert found.before == pytest.approx(np.log(3))


def test_the_penalty_is_chosen_on_rows_that_the_fit_has_not_seen() -> None:
    """Labels without any relation to the states: strong penalties are best, and the weakest are not tried."""
    random = np.random.default_rng(2)
    gold = random.integers(0, 2, 40)
    tried = held_out(Turned(random.normal(size=(40, 40)), np.zeros((40, 2)), gold), softmax_fit.folds(40))
    losses = {penalty: found.loss for penalty, found in tried.items()}
    assert min(losses.values()) > 0.99 * np.log(2)
    assert min(losses, key=lambda penalty: losses[penalty]) >= 10
    assert len(losses) < len(softmax_fit.PENALTIES)


def test_rows_in_turns_of_their_labels_are_held_out_as_others() -> None:
    """Folds that took every third row would hold out one label each, and learn nothing of it."""
    gold = np.arange(60) % 3
    states = np.eye(3)[gold] + 0.1 * np.random.default_rng(3).normal(size=(60, 3))
    assert min(found.loss for found in held_out(Turned(states, np.zeros((60, 3)), gold), softmax_fit.folds(60)).values()) < 0.2


def test_candidates_that_share_a_first_token_have_no_rows_of_their_own() -> None:
    def row(*completions: list[int]) -> Example:
        return Example([([1, 2], completion) for completion in completions], 0)

    assert first_tokens([row([5], [6]), row([5], [6])], 2) == [5, 6]
    assert first_tokens([row([5, 7], [6]), row([5, 7], [6])], 2) == [5, 6]
    assert first_tokens([row([5, 7], [5, 8])], 2) is None
    assert first_tokens([row([5], [6]), row([5], [7])], 2) is None
    assert first_tokens([Example([([1], [5]), ([1, 2], [6])], 0)], 2) is None


# rows of the head in the graphs


@pytest.mark.parametrize(
    "settings",
    [{}, {"adapter": "lora"}, {"adapter": "lora", "weights": "int4"}, {"adapter": "lora", "weights": "fp16"}, {"adapter": "prefix"}],
)
def test_rows_change_the_logits_of_their_tokens_alone(export_tiny: Callable[..., Path], settings: dict[str, Any]) -> None:
    model = EdgeModel(export_tiny("llama", **settings), threads=1)
    prompt, others = [264, 308, 288], [5, 9, 200]
    pairs = [(prompt, [token]) for token in (17, 31, *others)]
    scores, (state, *_) = Sequences(model).states(pairs)[:2]
    before = np.concatenate(scores)
    random = np.random.default_rng(0)
    model.head = HeadRows(np.array([31, 17]), random.normal(size=(len(state), 2)).astype(np.float32))
    after = np.concatenate(Sequences(model).log_probs(pairs))
    changes = after - before
    assert np.abs(changes[2:] - changes[2]).max() < 1e-5
    assert np.abs((changes[:2] - changes[2]) - (state @ model.head.rows)[[1, 0]]).max() < 1e-4


def test_generation_uses_the_rows(exported_dir: Path) -> None:
    model = EdgeModel(exported_dir, threads=1)
    state = Sequences(model).hidden_states([model.text.encode("the film", True)])[0]
    (token,) = model.text.encode("a", False)
    assert model.generate("the film", max_tokens=1) != "a"
    model.head = HeadRows(np.array([token]), (100 * state / (state @ state)).astype(np.float32)[:, None])
    assert model.generate("the film", max_tokens=1) == "a"


def test_rows_are_summed_by_token() -> None:
    one = HeadRows(np.array([7, 3]), np.array([[1.0, 2.0]], np.float32))
    other = HeadRows(np.array([3, 9]), np.array([[10.0, 20.0]], np.float32))
    found = summed([NO_ROWS, one, other], [5.0, 1.0, 0.5])
    assert (found.tokens.tolist(), found.rows.tolist()) == ([3, 7, 9], [[7.0, 1.0, 10.0]])


# the journal


def test_a_record_of_the_head_is_read_back(tmp_path: Path) -> None:
    head = HeadRows(np.array([4, 2]), np.arange(6, dtype=np.float32).reshape(3, 2))
    Journal.create(tmp_path / "j", {"config": {}}, [head_record(head)]).close()
    data = (tmp_path / "j").read_bytes()
    contents = read_journal(tmp_path / "j")
    assert contents.heads.keys() == {0}
    assert contents.heads[0].equals(head)
    assert contents.head_at(5) is contents.heads[0]
    for cut in range(1, len(head_record(head)[1]) + 5):
        (tmp_path / "j").write_bytes(data[:-cut])
        assert read_journal(tmp_path / "j").heads == {}


@pytest.mark.parametrize(
    "head", [HeadRows(np.array([4]), np.full((3, 1), np.nan, np.float32)), HeadRows(np.array([4, 4]), np.ones((3, 2), np.float32))]
)
def test_a_head_that_no_run_writes_is_refused(tmp_path: Path, head: HeadRows) -> None:
    Journal.create(tmp_path / "j", {"config": {}}, [head_record(head)]).close()
    message = f"{tmp_path / 'j'}: a record of the head holds NaN, infinity or a token twice, which no run writes; the run cannot be used"
    with pytest.raises(RunError, match=f"^{re.escape(message)}$"):
        read_journal(tmp_path / "j")


# runs


@pytest.mark.parametrize("settings", [{}, {"adapter": "lora"}, {"adapter": "prefix"}])
def test_a_run_starts_exactly_and_is_rebuilt_from_its_journal(
    export_tiny: Callable[..., Path], rows: str, tmp_path: Path, settings: dict[str, Any]
) -> None:
    directory = export_tiny("llama", **settings)
    result = tuned_run(directory, tmp_path / "whole", rows)
    assert result.before is not None
    assert result.start is not None
    assert result.start.score() > result.before.score()
    assert result.start.loss < 0.7 * result.before.loss
    tuned_run(directory, tmp_path / "parts", rows, steps=1)
    resumed = edgezo.tune(directory, tmp_path / "parts", resume=True, steps=3, threads=1)
    assert (resumed.before, resumed.start) == (result.before, result.start)
    contents = [read_journal(tmp_path / name / "journal.bin") for name in ("whole", "parts")]
    assert contents[0].records == contents[1].records
    found = [edge_log_probs(EdgeModel(directory, run=tmp_path / name, step="last", threads=1), make_pairs()) for name in ("whole", "parts")]
    assert np.array_equal(*found)
    start = EdgeModel(directory, run=tmp_path / "whole", step=0, threads=1)
    assert start.head.equals(contents[0].heads[0])
    assert edgezo.evaluate(directory, rows, run=tmp_path / "whole", step=0).evaluation == result.start
    start.use()
    assert start.head is NO_ROWS


def test_a_run_killed_between_its_start_and_its_first_evaluation_goes_on(lora_dir: Path, rows: str, tmp_path: Path) -> None:
    whole = tuned_run(lora_dir, tmp_path / "whole", rows)
    contents = read_journal(tmp_path / "whole" / "journal.bin")
    assert contents.untuned is not None
    assert contents.evaluations[0] == whole.start
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    (tmp_path / "killed" / "journal.bin").unlink()
    assert contents.offsets is not None
    first = [*evaluation_records(0, contents.untuned, True), head_record(contents.heads[0]), offsets_record(contents.offsets)]
    Journal.create(tmp_path / "killed" / "journal.bin", contents.header, first).close()
    assert read_journal(tmp_path / "killed" / "journal.bin").evaluations == {}
    resumed = edgezo.tune(lora_dir, tmp_path / "killed", resume=True, threads=1)
    assert (resumed.before, resumed.start, resumed.best) == (whole.before, whole.start, whole.best)
    assert (tmp_path / "killed" / "journal.bin").read_bytes() == (tmp_path / "whole" / "journal.bin").read_bytes()


def test_losses_are_measured_as_if_the_start_had_not_seen_their_rows(
    lora_dir: Path, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offset scores are those of fits on the other folds, for the rows of the file in their order."""
    only(monkeypatch, "rows of the head")
    tuned_run(lora_dir, tmp_path / "run", rows, steps=0, labels="what,of")
    offsets = read_journal(tmp_path / "run" / "journal.bin").offsets
    assert offsets is not None
    assert sorted(offsets.rows) == list(range(len(ROWS)))
    model = EdgeModel(lora_dir, threads=1)
    config = make_config(None, {"data": rows}, None, {"template": TASK["template"], "labels": "what,of", **FEW})
    dataset = read_dataset(model, config)
    objective = Objective(Sequences(model), dataset.task, dataset.config)
    examples = [dataset.train.examples[row] for row in offsets.rows]
    (fit, *_) = exact_start.label_fits(objective, examples, read_features(objective, examples, 2))
    model.head = fit.make()
    assert objective.loss(dataset.with_offsets(offsets).train.examples) == pytest.approx(fit.held_out, abs=1e-3)
    assert objective.loss(dataset.train.examples) < 0.9 * fit.held_out


@pytest.mark.parametrize(
    "offsets",
    [
        Offsets(np.array([1, 1]), np.zeros((2, 2), np.float32)),
        Offsets(np.array([0, 1]), np.full((2, 2), np.nan, np.float32)),
    ],
)
def test_offsets_that_no_run_writes_are_refused(tmp_path: Path, offsets: Offsets) -> None:
    Journal.create(tmp_path / "j", {"config": {}}, [offsets_record(offsets)]).close()
    message = f"{tmp_path / 'j'}: a record of offsets holds NaN, infinity or a row twice, which no run writes; the run cannot be used"
    with pytest.raises(RunError, match=f"^{re.escape(message)}$"):
        read_journal(tmp_path / "j")


def test_offsets_are_read_as_written_and_torn_anywhere_left_out(tmp_path: Path) -> None:
    offsets = Offsets(np.array([5, 2, 9]), np.arange(6, dtype=np.float32).reshape(3, 2))
    Journal.create(tmp_path / "j", {"config": {}}, [offsets_record(offsets)]).close()
    data = (tmp_path / "j").read_bytes()
    found = read_journal(tmp_path / "j").offsets
    assert found is not None
    assert (found.rows.tolist(), found.values.tolist()) == ([5, 2, 9], [[0, 1], [2, 3], [4, 5]])
    for cut in range(1, len(offsets_record(offsets)[1]) + 5):
        (tmp_path / "j").write_bytes(data[:-cut])
        assert read_journal(tmp_path / "j").offsets is None


def test_the_steps_of_a_run_are_derived_again_with_its_head(lora_dir: Path, rows: str, tmp_path: Path, invoke: Any) -> None:
    tuned_run(lora_dir, tmp_path / "run", rows)
    found = json.loads(invoke("verify", str(tmp_path / "run"), "--base", str(lora_dir), "--every", "1", "--threads", "1", "--json").out)
    assert (found["steps_derived_again"], found["verdict"]) == (3, "no fault found")


def test_the_stages_of_a_start_are_told(lora_dir: Path, rows: str, write_rows: Callable[..., str], tmp_path: Path) -> None:
    stages: list[str] = []
    tuned_run(lora_dir, tmp_path / "run", rows, reporter=Reporter(stage=stages.append))
    begin = stages.index("validating the model as it is")
    count = len(ROWS)
    assert stages[begin + 1 : begin + 3] == [f"reading {count} rows for the exact start", f"solving the exact start from {count} rows"]
    assert stages[begin + 3].startswith("putting ")
    assert stages[begin + 4] == f"validating {stages[begin + 3].removeprefix('putting ').removesuffix(' into the model')}"
    stages.clear()
    texts = write_rows([{"prompt": row["text"], "completion": " it was"} for row in ROWS], "texts.jsonl")
    edgezo.tune(lora_dir, tmp_path / "texts", data=texts, threads=1, **FEW, reporter=Reporter(stage=stages.append))
    assert [stage.split()[0] for stage in stages if "start" in stage or "own" in stage][:3] == ["letting", "reading", "solving"]


def test_a_masked_model_starts_exactly(tmp_path: Path, rows: str) -> None:
    directory = edgezo.export_model(tiny_encoders.save(tmp_path / "source", "bert"), tmp_path / "edge").directory
    template = "{text} It was {mask} ."
    result = edgezo.tune(directory, tmp_path / "run", data=rows, valid=rows, steps=1, threads=1, template=template, labels="bad,good")
    assert result.before is not None
    assert result.start is not None
    assert result.start.loss < 0.5 * result.before.loss


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_classifier_starts_exactly_and_goes_to_hugging_face(tmp_path: Path, rows: str, name: str) -> None:
    source = tiny_encoders.save(tmp_path / "source", name, head="")
    directory = edgezo.export_model(source, tmp_path / "edge", classes="bad,good", adapter="lora").directory
    result = edgezo.tune(directory, tmp_path / "run", data=rows, valid=rows, steps=1, directions=4, threads=1, template="{text}")
    assert result.before is not None
    assert result.start is not None
    assert result.start.loss < 0.8 * result.before.loss
    model = EdgeModel(directory, run=tmp_path / "run", step="last", threads=1)
    text = model.text.encode("the film is great", True)
    expected = np.concatenate(Sequences(model).log_probs([Classified(text, target) for target in (0, 1)]))
    write_tuned(directory, [tmp_path / "run"], [1.0], "last", tmp_path / "hf", "hf", threads=1)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    found = torch.log_softmax(network(torch.tensor([text])).logits[0], 0).detach().numpy()
    assert np.abs(found - expected).max() < 1e-4
    message = f"{model.manifest.origin.id}: the run changed rows of the head beside LoRA at the same layer, which a PEFT folder cannot hold; use --format hf or edge, or tune with --start none"
    with pytest.raises(AdapterError, match=f"^{re.escape(message)}$"):
        write_tuned(directory, [tmp_path / "run"], [1.0], "last", tmp_path / "peft", "peft", threads=1)


def test_what_the_start_did_is_told(lora_dir: Path, rows: str, tmp_path: Path, invoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "rows of the head")
    options = ["--template", TASK["template"], "--labels", TASK["labels"], "--threads", "1", "--directions", "4", "--steps", "1"]
    found = invoke("tune", str(lora_dir), "--data", rows, "--valid", rows, "-o", str(tmp_path / "run"), *options)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    before, start = (100 * summary[name]["accuracy"] for name in ("before", "start"))
    losses = " -> ".join(f"{summary[name]['loss']:.3f}" for name in ("before", "start"))
    told = (
        f"exact start: rows of the head for 2 label words, from 24 rows: validation accuracy {before:.1f} % -> {start:.1f} %, loss {losses}"
    )
    assert told in " ".join(found.err.split())
    assert re.search(rf"^before +accuracy {before:.1f} %.*\nexact start +accuracy {start:.1f} %", found.out, re.M)


def test_inspect_tells_of_the_start(invoke: Any, lora_dir: Path, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, shown in (("rows of the head", "2 tokens"), ("a probe", "2 tokens, and a probe of the attention of 2 layers")):
        with monkeypatch.context() as patched:
            only(patched, kind)
            result = tuned_run(lora_dir, tmp_path / kind, rows, steps=0)
        found = json.loads(invoke("inspect", str(tmp_path / kind), "--json").out)
        assert found["head_at_start"] == f"rows of the head for {shown}"
        assert found["valid_before_start"] == result.before.as_dict()
        assert found["valid_at_step_0"] == result.start.as_dict()
    tuned_run(lora_dir, tmp_path / "none", rows, steps=0, start="none")
    assert not {"head_at_start", "valid_before_start"} & json.loads(invoke("inspect", str(tmp_path / "none"), "--json").out).keys()


def test_a_start_of_the_head_alone_leaves_the_attention_as_it_is(lora_dir: Path, rows: str, tmp_path: Path) -> None:
    tuned_run(lora_dir, tmp_path / "run", rows, steps=0, start="head")
    head = read_journal(tmp_path / "run" / "journal.bin").heads[0]
    assert len(head.tokens) == 2
    assert not head.probe.size
    assert json.loads((tmp_path / "run" / "config.json").read_text())["start"] == "head"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"labels": None, "template": None},
            "--start exact: rows of kind preference have no exact start, give rows with right texts; or give --start none",
        ),
        (
            {"labels": "great,great film"},
            "--start exact: the label words great, great film do not begin with tokens of their own, choose other words; or give --start none",
        ),
    ],
)
def test_an_exact_start_that_cannot_be_is_refused(
    lora_dir: Path, write_rows: Callable[..., str], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    rows = write_rows([{**row, "prompt": row["text"], "chosen": "yes", "rejected": "no"} for row in ROWS])
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        tuned_run(lora_dir, tmp_path / "run", rows, start="exact", **settings)
    assert not (tmp_path / "run").exists()
    notices: list[str] = []
    reporter = edgezo.Reporter(notice=notices.append)
    tuned_run(lora_dir, tmp_path / "run", rows, reporter=reporter, **settings)
    reason = message.removeprefix("--start exact: ").removesuffix("; or give --start none")
    assert [text for text in notices if "exact start" in text] == ([f"no exact start: {reason}"] if settings["labels"] else [])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["start"] == "none"


# elsewhere


@pytest.fixture(params=["rows of the head", "a probe"])
def run(lora_dir: Path, rows: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any]:
    """A run of LoRA with an exact start of either kind, and the scores of its last step."""
    only(monkeypatch, request.param)
    tuned_run(lora_dir, tmp_path / "run", rows, lr=5e-2, rank=1)
    return tmp_path / "run", edge_log_probs(EdgeModel(lora_dir, run=tmp_path / "run", step="last", threads=1), make_pairs())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_peft_folder_holds_the_rows(lora_dir: Path, rows: str, run: tuple[Path, Any], tmp_path: Path) -> None:
    write_tuned(lora_dir, [run[0]], [1.0], "last", tmp_path / "out", "peft", threads=1)
    assert np.abs(network_log_probs(peft_network("llama", tmp_path / "out"), make_pairs()) - run[1]).max() < 1e-4
    model = EdgeModel(lora_dir, adapter=tmp_path / "out", threads=1)
    assert np.abs(edge_log_probs(model, make_pairs()) - run[1]).max() < 1e-5
    edgezo.tune(lora_dir, tmp_path / "next", data=rows, init=str(tmp_path / "out"), start="none", **{**TASK, **FEW})
    start = EdgeModel(lora_dir, run=tmp_path / "next", step=0, threads=1)
    assert np.abs(edge_log_probs(start, make_pairs()) - run[1]).max() < 1e-4


def test_an_onnx_adapter_holds_the_rows(lora_dir: Path, run: tuple[Path, Any], tmp_path: Path) -> None:
    write_tuned(lora_dir, [run[0]], [1.0], "last", tmp_path / "a.onnx_adapter", "onnx-adapter", threads=1)
    model = EdgeModel(lora_dir, adapter=tmp_path / "a.onnx_adapter", threads=1)
    assert np.abs(edge_log_probs(model, make_pairs()) - run[1]).max() < 1e-5


def test_a_hugging_face_folder_has_a_head_of_its_own(lora_dir: Path, run: tuple[Path, Any], tmp_path: Path) -> None:
    write_tuned(lora_dir, [run[0]], [1.0], "last", tmp_path / "out", "hf", threads=1)
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert np.abs(network_log_probs(network, make_pairs()) - run[1]).max() < 1e-4
    assert network.lm_head.weight is not network.model.embed_tokens.weight


def test_an_edge_model_holds_the_rows_and_can_be_tuned_on(lora_dir: Path, rows: str, run: tuple[Path, Any], tmp_path: Path) -> None:
    write_tuned(lora_dir, [run[0]], [1.0], "last", tmp_path / "out", "edge", threads=1)
    assert np.abs(edge_log_probs(EdgeModel(tmp_path / "out", threads=1), make_pairs()) - run[1]).max() < 1e-4
    result = tuned_run(tmp_path / "out", tmp_path / "again", rows, steps=1)
    assert result.before == edgezo.evaluate(tmp_path / "out", rows, **TASK).evaluation
    write_tuned(tmp_path / "out", [tmp_path / "again"], [1.0], 0, tmp_path / "twice", "edge", threads=1)
    once, twice = (EdgeModel(path, threads=1) for path in (tmp_path / "out", tmp_path / "twice"))
    started = EdgeModel(tmp_path / "out", run=tmp_path / "again", step=0, threads=1)
    assert twice.head.equals(started.head)
    assert twice.head.rows.shape == once.head.rows.shape


def test_a_damaged_head_file_is_refused(lora_dir: Path, run: tuple[Path, Any], tmp_path: Path) -> None:
    write_tuned(lora_dir, [run[0]], [1.0], "last", tmp_path / "out", "edge", threads=1)
    path = tmp_path / "out" / "head.bin"
    data = path.read_bytes()
    path.write_bytes(np.array([1, 1], "<i8").tobytes() + data[16:])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["files"]["head.bin"]["sha256"] = sha256_file(path)
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    message = f"{path}: rows of the head of tokens that the model has not, twice, or not finite; copy or merge the edge model again"
    with pytest.raises(EdgeModelError, match=f"^{re.escape(message)}$"):
        EdgeModel(tmp_path / "out", threads=1)
    manifest["tensors"] = [tensor for tensor in manifest["tensors"] if tensor["name"] != "head_tokens"]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    left = ", ".join(name for name in ("head_rows", "probe_A") if name in {tensor["name"] for tensor in manifest["tensors"]})
    message = f"{tmp_path / 'out' / 'manifest.json'}: its rows of the head ({left}) do not fit each other; export the model again"
    with pytest.raises(EdgeModelError, match=f"^{re.escape(message)}$"):
        EdgeModel(tmp_path / "out", threads=1)


def test_no_steps_are_an_exact_start_alone(lora_dir: Path, rows: str, tmp_path: Path) -> None:
    result = tuned_run(lora_dir, tmp_path / "run", rows, steps=0)
    assert (result.steps, result.ended, result.best_step) == (0, "finished", 0)
    assert result.best == result.start != result.before
    resumed = edgezo.tune(lora_dir, tmp_path / "run", resume=True, steps=2, threads=1)
    assert (resumed.steps, resumed.start) == (2, result.start)
    assert resumed.forward_rows >= result.forward_rows + 2 * 2 * 8


def test_an_older_export_refuses_what_it_cannot_be_fed(lora_dir: Path, run: tuple[Path, Any], tmp_path: Path) -> None:
    """The same weights, but graphs without inputs for rows of the head would give other scores without a word."""
    write_tuned(lora_dir, [run[0]], [1.0], "last", tmp_path / "a.onnx_adapter", "onnx-adapter", threads=1)
    old = Path(shutil.copytree(lora_dir, tmp_path / "old"))
    manifest = json.loads((old / "manifest.json").read_text())
    (old / "manifest.json").write_text(json.dumps({**manifest, "version": 3, "probes": []}))
    reason = (
        f"{run[0]}: has an exact start, and {old} was exported without inputs for it; export it again, or give the one it was tuned from"
    )
    with pytest.raises(RunError, match=f"^{re.escape(reason)}$"):
        EdgeModel(old, run=run[0], threads=1)
    probed = read_journal(run[0] / "journal.bin").heads[0].probe.size
    missing = (
        "has a probe of the attention, and this edge model was exported without inputs for it"
        if probed
        else f"changes rows of the head, and {old} was exported without inputs for them"
    )
    reason = f"{tmp_path / 'a.onnx_adapter'}: {missing}; export it again"
    with pytest.raises(AdapterError, match=f"^{re.escape(reason)}$"):
        EdgeModel(old, adapter=tmp_path / "a.onnx_adapter", threads=1)


def test_an_exact_start_alone_is_written_without_a_note(lora_dir: Path, rows: str, tmp_path: Path, invoke: Any) -> None:
    tuned_run(lora_dir, tmp_path / "run", rows, steps=0)
    assert "note:" not in invoke("replay", str(lora_dir), str(tmp_path / "run"), "-o", str(tmp_path / "out")).err
    tuned_run(lora_dir, tmp_path / "none", rows, steps=0, start="none")
    assert "note: step 0 is the start" in invoke("replay", str(lora_dir), str(tmp_path / "none"), "-o", str(tmp_path / "other")).err


def test_the_average_of_runs_averages_their_rows(lora_dir: Path, rows: str, run: tuple[Path, Any], tmp_path: Path) -> None:
    tuned_run(lora_dir, tmp_path / "other", rows, start_rows=8, lr=5e-2, rank=1)
    write_tuned(lora_dir, [run[0], tmp_path / "other"], [0.25, 0.75], "last", tmp_path / "out", "edge", threads=1)
    one, other = (EdgeModel(lora_dir, run=path, threads=1).head for path in (run[0], tmp_path / "other"))
    found = EdgeModel(tmp_path / "out", threads=1).head
    assert np.abs(found.rows - (0.25 * one.rows + 0.75 * other.rows)).max() < 1e-6
    assert np.allclose(found.probe, 0.25 * one.probe + 0.75 * other.probe, atol=1e-5)


def test_a_peft_folder_of_a_prefix_cannot_hold_them(prefix_dir: Path, rows: str, tmp_path: Path) -> None:
    tuned_run(prefix_dir, tmp_path / "run", rows)
    message = "source: the run changed rows of the head, which a PEFT folder of a prefix cannot hold; use --format edge, or tune with --start none"
    with pytest.raises(AdapterError, match=f"^{re.escape(message)}$"):
        write_tuned(prefix_dir, [tmp_path / "run"], [1.0], "last", tmp_path / "out", "peft", threads=1)
    assert not (tmp_path / "out").exists()
    write_tuned(prefix_dir, [tmp_path / "run"], [1.0], "last", tmp_path / "edge", "edge", threads=1)
    expected = edge_log_probs(EdgeModel(prefix_dir, run=tmp_path / "run", step="last", threads=1), make_pairs())
    assert np.abs(edge_log_probs(EdgeModel(tmp_path / "edge", threads=1), make_pairs()) - expected).max() < 1e-5


def test_an_adapter_that_changes_too_many_rows_is_refused(lora_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = EdgeModel(lora_dir, threads=1)
    randomise(model)
    folder = write_adapter(model, tmp_path / "plain")
    assert EdgeModel(lora_dir, adapter=folder, threads=1).head is NO_ROWS
    head = HeadRows(np.arange(3), np.ones((32, 3), np.float32))
    (tmp_path / "rows").mkdir()
    assert model.adapter is not None
    write_peft(model.adapter, model.manifest, tmp_path / "rows", head)
    monkeypatch.setattr(head_rows, "HEAD_TOKENS_LIMIT", 2)
    message = f"{tmp_path / 'rows'}: changes 3 rows of the head, edgezo takes 2; train the adapter without the head"
    with pytest.raises(AdapterError, match=f"^{re.escape(message)}$"):
        EdgeModel(lora_dir, adapter=tmp_path / "rows", threads=1)
