"""Log-probabilities, losses and metrics are those of the source model, however the work is cut into forwards."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from reference import make_objective

from edgezo.runtime import scoring
from edgezo.runtime.class_metrics import count_classes, macro_f1
from edgezo.runtime.evaluation import Evaluation
from edgezo.runtime.examples import Example
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.scoring import Pair, Sequences

PAIRS: list[Pair] = [
    ([264, 308, 288], [265]),  # one token
    ([264, 308, 288], [309, 280]),  # the same prompt, two tokens
    ([264, 308, 288], [266]),  # shares its hidden state with the first
    ([0], [264, 308, 288, 265, 309, 280]),  # one token of prompt
    ([5, 9, 200, 31, 7, 7, 7, 150, 299, 40, 41, 42], [43, 44, 45]),
    ([264, 308, 288, 265], [309, 280]),  # an earlier pair's prompt and completion, split elsewhere
    ([17], [17]),
    ([*range(100, 220)], [220, 221, 222, 1]),  # nearly the whole context
]


@pytest.fixture(scope="module")
def network() -> Any:
    """The source model of tests/conftest.py in PyTorch: the same seed."""
    return tiny.make_model("llama")


def torch_log_probs(network: Any, pair: Pair) -> list[float]:
    """log softmax of the source model at every completion token, one pair a forward."""
    prompt, completion = pair
    with torch.no_grad():
        logits = network(torch.tensor([[*prompt, *completion]])).logits[0].double()
    chosen = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1, :]
    return [float(chosen[index, target]) for index, target in enumerate(completion)]


def joined(scores: Any) -> list[float]:
    """All numbers of all pairs in one list."""
    return [float(value) for part in scores for value in part]


def test_log_probs_are_the_log_softmax_of_the_source(model: EdgeModel, network: Any) -> None:
    found = Sequences(model).log_probs(PAIRS)
    assert [len(part) for part in found] == [len(completion) for _, completion in PAIRS]
    for part, pair in zip(found, PAIRS, strict=True):
        assert part.dtype == np.float64
        assert part.tolist() == pytest.approx(torch_log_probs(network, pair), abs=1e-4)


def test_the_reference_tells_models_apart(model: EdgeModel) -> None:
    other = tiny.make_model("llama", seed=1)
    assert abs(Sequences(model).log_probs(PAIRS[:1])[0][0] - torch_log_probs(other, PAIRS[0])[0]) > 1e-2


def recorded(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The feeds of every forward from now on."""
    forwards: list[dict[str, Any]] = []
    run = model.scoring.run
    monkeypatch.setattr(model.scoring, "run", lambda outputs, feeds: forwards.append(feeds) or run(outputs, feeds))
    return forwards


def limited(model: EdgeModel, tokens: int, hidden: int, long: int | None = None) -> Sequences:
    """With other limits of a forward than the usual ones."""
    sequences = Sequences(model, batch_tokens=tokens)
    sequences.batch_hidden, sequences.long_hidden = hidden, long or hidden
    return sequences


def hidden_of(feeds: dict[str, Any]) -> list[tuple[int, ...]]:
    """What each hidden row of a forward has read: the tokens up to it."""
    ids, mask = feeds["input_ids"], feeds["attention_mask"]
    places = [divmod(int(place), ids.shape[1]) for place in feeds["hidden_rows"]]
    assert all(mask[row, : position + 1].all() for row, position in places)
    return [tuple(ids[row, : position + 1].tolist()) for row, position in places]


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 1), (1, 1000), (2048, 1), (2048, 3), (16, 2), (130, 5), (300, 1000)])
def test_micro_batch_limits_do_not_change_the_numbers(model: EdgeModel, monkeypatch: pytest.MonkeyPatch, tokens: int, hidden: int) -> None:
    whole = joined(Sequences(model).log_probs(PAIRS))
    forwards = recorded(model, monkeypatch)
    assert joined(limited(model, tokens, hidden).log_probs(PAIRS)) == pytest.approx(whole, abs=1e-5)
    assert len(forwards) > 1


def test_tiny_limits_make_more_forwards(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = recorded(model, monkeypatch)
    Sequences(model).log_probs(PAIRS)
    assert len(forwards) == 1
    Sequences(model, batch_tokens=1).log_probs(PAIRS)
    assert len(forwards) == 1 + len(scoring.lay_out(PAIRS).sequences)


def test_one_long_text_may_have_more_hidden_rows_than_many_texts(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs: list[Pair] = [([3], [4] * length) for length in (9, 5, 2, 1)]
    whole = joined(Sequences(model).log_probs(pairs))
    forwards = recorded(model, monkeypatch)
    assert joined(limited(model, 1000, 3, long=6).log_probs(pairs)) == pytest.approx(whole, abs=1e-5)
    assert [len(feeds["hidden_rows"]) for feeds in forwards] == [6, 3, 5, 3]


STAIRS: list[Pair] = [([*range(2, 2 + length)], [5, 6]) for length in range(1, 20)]


@pytest.mark.parametrize(("tokens", "hidden"), [(60, 1000), (1000, 7), (60, 7), (60, 1)])
def test_no_forward_holds_more_than_its_limits(model: EdgeModel, monkeypatch: pytest.MonkeyPatch, tokens: int, hidden: int) -> None:
    forwards = recorded(model, monkeypatch)
    limited(model, tokens, hidden).log_probs(STAIRS)
    expected = [part for prompt, _ in STAIRS for part in (tuple(prompt), (*prompt, 5))]
    assert sorted(row for feeds in forwards for row in hidden_of(feeds)) == sorted(expected)
    assert max(feeds["input_ids"].size for feeds in forwards) <= tokens
    assert max(feeds["hidden_rows"].size for feeds in forwards) <= hidden


GROUPS = [STAIRS[:5], STAIRS[3:9], PAIRS[:4], STAIRS[4:14]]  # of four directions, unlike in rows and lengths


def same_copies(asked: list[tuple[list[int], tuple[int, ...]]]) -> scoring.Copies:
    """Copies that are all the base itself; what was asked for is written down."""

    def copies(groups: Any, sides: Any) -> dict[str, Any]:
        asked.append((list(groups), tuple(sides)))
        return {}

    return copies


@pytest.mark.parametrize("sides", [(1, -1), (1,)])
@pytest.mark.parametrize(("tokens", "hidden"), [(2048, 1000), (120, 1000), (2048, 14), (60, 6), (48, 2)])
def test_stacked_copies_of_the_base_have_its_numbers_within_the_same_limits(
    model: EdgeModel, monkeypatch: pytest.MonkeyPatch, tokens: int, hidden: int, sides: tuple[int, ...]
) -> None:
    whole = [joined(Sequences(model).log_probs(group)) for group in GROUPS]
    forwards = recorded(model, monkeypatch)
    asked: list[tuple[list[int], tuple[int, ...]]] = []
    found = limited(model, tokens, hidden).stacked(GROUPS, sides, same_copies(asked))
    for group, expected in zip(found, whole, strict=True):
        assert len(group) == len(sides)
        for side in group:
            assert joined(side) == pytest.approx(expected, abs=1e-5)
    assert max(feeds["input_ids"].size for feeds in forwards) <= tokens
    assert max(feeds["hidden_rows"].size for feeds in forwards) <= hidden
    assert (len(forwards) == 1) == (tokens == 2048 and hidden == 1000)
    assert [copies for _, copies in asked] == [sides] * len(forwards)


def test_the_rows_of_a_stacked_forward_are_in_equal_parts_in_the_order_of_its_copies(
    model: EdgeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = recorded(model, monkeypatch)
    asked: list[tuple[list[int], tuple[int, ...]]] = []
    limited(model, 400, 1000).stacked(GROUPS, (1, -1), same_copies(asked))
    assert 1 < len(forwards) < len(GROUPS)
    assert any(groups != sorted(groups) for groups, _ in asked)
    wanted: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for feeds, (groups, sides) in zip(forwards, asked, strict=True):
        rows, rest = divmod(len(feeds["input_ids"]), len(groups) * len(sides))
        assert rest == 0
        copies = [(group, side) for group in groups for side in sides]
        width = feeds["input_ids"].shape[1]
        for place, state in zip(feeds["hidden_rows"], hidden_of(feeds), strict=True):
            wanted.setdefault(copies[int(place) // width // rows], []).append(state)
    for number, group in enumerate(GROUPS):
        layout = scoring.lay_out(group)
        expected = sorted(layout.sequences[sequence][: position + 1] for sequence, position in layout.hidden)
        assert sorted(wanted[number, 1]) == sorted(wanted[number, -1]) == expected


def test_single_token_candidates_of_a_prompt_share_one_hidden_state() -> None:
    layout = scoring.lay_out([([1, 2, 3], [label]) for label in (7, 8, 9)])
    assert (len(layout.sequences), len(layout.hidden), len(layout.scored)) == (1, 1, 3)


def test_repeated_pairs_have_the_same_numbers(model: EdgeModel) -> None:
    once = Sequences(model).log_probs([PAIRS[1], PAIRS[3]])
    found = Sequences(model).log_probs([PAIRS[1], PAIRS[3], PAIRS[1], PAIRS[1]])
    assert [found[index].tolist() for index in (0, 2, 3)] == [found[0].tolist()] * 3
    assert joined(found[:2]) == pytest.approx(joined(once), abs=1e-6)


def test_the_order_of_the_pairs_does_not_matter(model: EdgeModel) -> None:
    found = Sequences(model).log_probs(PAIRS)
    assert joined(Sequences(model).log_probs(PAIRS[::-1])[::-1]) == pytest.approx(joined(found), abs=1e-5)


def test_scores_follow_the_weights_in_place(model: EdgeModel) -> None:
    sequences = Sequences(model)
    before = joined(sequences.log_probs(PAIRS))
    model.weights["model.layers.1.mlp.down_proj.weight"][...] *= 2
    assert np.abs(np.subtract(joined(sequences.log_probs(PAIRS)), before)).max() > 1e-3


CLASSIFIED = [
    Example([([264, 308, 288], [265]), ([264, 308, 288], [309, 280]), ([264, 308, 288], [266])], 1),
    Example([([5, 9, 200], [43]), ([5, 9, 200], [44, 45]), ([5, 9, 200], [46])], 0),
    Example([([7], [43]), ([7], [44, 45]), ([7], [46])], 2),
    Example([([7, 8], [43]), ([7, 8], [44, 45]), ([7, 8], [46])], 1),
]
COMPLETED = [Example([pair], 0) for pair in PAIRS]


def torch_sums(network: Any, examples: list[Example]) -> torch.Tensor:
    """Summed log-probabilities of the source model, [rows, candidates]."""
    return torch.tensor([[sum(torch_log_probs(network, pair)) for pair in example.pairs] for example in examples], dtype=torch.float64)


def test_the_loss_of_classification_is_cross_entropy_over_the_candidates(model: EdgeModel, network: Any) -> None:
    gold = torch.tensor([example.gold for example in CLASSIFIED])
    expected = float(torch.nn.functional.cross_entropy(torch_sums(network, CLASSIFIED), gold))
    assert make_objective(Sequences(model)).loss(CLASSIFIED) == pytest.approx(expected, abs=1e-4)


def test_the_loss_of_completions_is_the_mean_over_all_their_tokens(model: EdgeModel, network: Any) -> None:
    tokens = [value for pair in PAIRS for value in torch_log_probs(network, pair)]
    assert make_objective(Sequences(model), "completion").loss(COMPLETED) == pytest.approx(-np.mean(tokens), abs=1e-4)


def test_evaluating_candidates_gives_loss_accuracy_and_macro_f1(model: EdgeModel, network: Any) -> None:
    sums, gold = torch_sums(network, CLASSIFIED), [example.gold for example in CLASSIFIED]
    predicted = sums.argmax(1).tolist()
    found = make_objective(Sequences(model)).evaluate(CLASSIFIED)
    assert found.rows == 4
    assert found.loss == pytest.approx(float(torch.nn.functional.cross_entropy(sums, torch.tensor(gold))), abs=1e-4)
    assert found.accuracy == np.mean(np.equal(predicted, gold))
    assert found.macro_f1 == pytest.approx(plain_macro_f1(predicted, gold))
    assert found.perplexity is None


def test_evaluating_completions_gives_loss_and_perplexity(model: EdgeModel, network: Any) -> None:
    loss = -float(np.mean([value for pair in PAIRS for value in torch_log_probs(network, pair)]))
    found = make_objective(Sequences(model), "completion").evaluate(COMPLETED)
    assert (found.rows, found.accuracy, found.macro_f1) == (len(PAIRS), None, None)
    assert found.loss == pytest.approx(loss, abs=1e-4)
    assert found.perplexity == pytest.approx(np.exp(loss), rel=1e-4)


def test_accuracy_is_whole_when_gold_is_what_the_model_prefers(model: EdgeModel, network: Any) -> None:
    preferred = torch_sums(network, CLASSIFIED).argmax(1).tolist()
    right = [example._replace(gold=index) for example, index in zip(CLASSIFIED, preferred, strict=True)]
    wrong = [example._replace(gold=(index + 1) % 3) for example, index in zip(CLASSIFIED, preferred, strict=True)]
    objective = make_objective(Sequences(model))
    assert (objective.evaluate(right).accuracy, objective.evaluate(wrong).accuracy) == (1.0, 0.0)


def test_as_dict_leaves_out_what_there_is_not() -> None:
    assert Evaluation(3, 1.5).as_dict() == {"rows": 3, "loss": 1.5, "perplexity": math.exp(1.5)}
    assert Evaluation(3, 1.5, 0.0, 0.0).as_dict() == {"rows": 3, "loss": 1.5, "accuracy": 0.0, "macro_f1": 0.0}


def test_a_better_accuracy_beats_a_lower_loss() -> None:
    assert Evaluation(9, 2.0, 0.8, 0.8).score() > Evaluation(9, 1.0, 0.7, 0.9).score()
    assert Evaluation(9, 1.0, 0.8, 0.1).score() > Evaluation(9, 2.0, 0.8, 0.9).score()
    assert Evaluation(9, 1.0).score() > Evaluation(9, 2.0).score()
    ranks = [found.ranked_by for found in (Evaluation(9, 1.0), Evaluation(9, 1.0, 0.8), Evaluation(9, 1.0, 0.8, others={"rouge_l": 0.2}))]
    assert ranks == ["loss", "accuracy, then loss", "rouge l, then loss"]


def plain_macro_f1(predicted: list[int], gold: list[int]) -> float:
    """The definition, class by class: the harmonic mean of precision and recall."""
    scores = []
    for label in sorted({*predicted, *gold}):
        hits = sum(p == g == label for p, g in zip(predicted, gold, strict=True))
        precision, recall = hits / max(1, predicted.count(label)), hits / max(1, gold.count(label))
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    return sum(scores) / len(scores)


@pytest.mark.parametrize(
    ("predicted", "gold", "classes", "expected"),
    [
        ([0, 1, 0, 1], [0, 1, 0, 1], 2, 1.0),
        ([0, 0, 0, 0], [0, 0, 1, 1], 2, (2 / 3 + 0) / 2),
        ([1, 0], [0, 1], 2, 0.0),
        ([0, 1, 2, 2, 1, 0], [0, 1, 1, 2, 2, 0], 3, (1 + 1 / 2 + 1 / 2) / 3),
        ([0, 1, 1], [0, 0, 1], 2, (2 / 3 + 2 / 3) / 2),
        ([0, 2], [0, 2], 4, 1.0),  # classes 1 and 3 occur nowhere
        ([0, 1], [0, 0], 3, (2 / 3 + 0) / 2),  # class 1 is only predicted
    ],
)
def test_macro_f1_of_hand_computed_cases(predicted: list[int], gold: list[int], classes: int, expected: float) -> None:
    assert macro_f1(count_classes(np.array(predicted), np.array(gold), classes)) == pytest.approx(expected)
    assert plain_macro_f1(predicted, gold) == pytest.approx(expected)


def test_log_probs_of_texts_are_summed_over_the_completion(model: EdgeModel, network: Any) -> None:
    prompts, completions = ["the film is", "the film is", "the f"], [" great", " terrible", "ilm is great"]
    expected = [
        sum(torch_log_probs(network, model.text.split(prompt, completion))) for prompt, completion in zip(prompts, completions, strict=True)
    ]
    assert model.log_probs(prompts, completions) == pytest.approx(expected, abs=1e-4)


def test_log_probs_refuses_lists_of_unequal_length(model: EdgeModel) -> None:
    with pytest.raises(ValueError, match="shorter"):
        model.log_probs(["a", "b"], ["c"])


def test_log_probs_of_nothing_are_none(model: EdgeModel) -> None:
    assert model.log_probs([], []) == []


def test_an_empty_prompt_is_the_beginning_of_text(model: EdgeModel, network: Any) -> None:
    expected = sum(torch_log_probs(network, ([0], model.text.encode("great"))))
    assert model.log_probs(["", "the film is"], ["great", " great"])[0] == pytest.approx(expected, abs=1e-4)


def test_an_empty_completion_has_probability_one(model: EdgeModel) -> None:
    assert model.log_probs(["the film"], [""]) == [0.0]


def test_threads_do_not_change_the_numbers(exported_dir: Path, model: EdgeModel) -> None:
    two = EdgeModel(exported_dir, threads=2)
    assert joined(Sequences(two).log_probs(PAIRS)) == pytest.approx(joined(Sequences(model).log_probs(PAIRS)), abs=1e-5)
