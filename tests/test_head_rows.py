"""Rows of the head: solved as scikit-learn solves them, used by both graphs, and kept in the journal."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from edgezo.errors import RunError
from edgezo.runtime import softmax_fit
from edgezo.runtime.examples import Example, Offsets
from edgezo.runtime.head_rows import NO_ROWS, HeadRows, summed
from edgezo.runtime.journal import Journal
from edgezo.runtime.journal_reader import read_journal
from edgezo.runtime.journal_records import head_record, offsets_record
from edgezo.runtime.label_start import first_tokens
from edgezo.runtime.lbfgs import minimize
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.scoring import Sequences
from edgezo.runtime.softmax_fit import Turned, fit_softmax, held_out

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


@pytest.mark.parametrize(("count", "width"), [(60, 8), (12, 40)])
def test_a_feature_that_is_switched_off_is_not_relied_on(count: int, width: int) -> None:
    """It tells the label by itself, in rounding errors."""
    random = np.random.default_rng(1)
    gold = np.arange(count) % 3
    states, scores = random.normal(size=(count, width)), np.zeros((count, 3))
    dead, zero = 1e-30 * (gold[:, None] - 1.0), np.zeros((count, 1))
    found, without = (fit_softmax(np.hstack([states, column]), scores, gold) for column in (dead, zero))
    assert np.abs(found.weights[-1]).max() < 1e-20
    assert np.allclose(found.weights[:-1], without.weights[:-1])
    assert found.held_out.loss == pytest.approx(without.held_out.loss)
    assert not fit_softmax(zero, scores, gold).weights.any()


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
