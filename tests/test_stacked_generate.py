"""Answers under many copies of an adapter at once: those of each copy alone."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ExportTiny
from objective_rows import objective_of
from tiny_adapters import digest, make_theta, perturbed

import edgezo
from edgezo.runtime import device as device_module
from edgezo.runtime import model as edge_model
from edgezo.runtime.batch_generate import generate_batch
from edgezo.runtime.estimators import ESTIMATORS
from edgezo.runtime.lora import Lora
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.noise import Direction
from edgezo.runtime.objective import Objective
from edgezo.runtime.prompt_cache import Beginning, perturbed_beginning
from edgezo.runtime.scoring import BATCH_TOKENS
from edgezo.runtime.stacked_generate import COPIES_BYTES, generate_stacked
from edgezo.runtime.theta import Theta, step_directions

SIDES, COUNT = (1, -1), 9
# lengths within a direction and between directions differ
GROUPS = [[[5, 9, 4], [7, 3, 8, 11, 6], [12]], [[5, 9, 4, 14, 2, 6, 8], [10, 11], [7]], [[3, 8], [4, 4, 6], [9, 13, 5]]]
# positions fed or counted by the cache, learned or rotary, a window that ends within these prompts
CASES = [
    ("llama", "lora", {}),
    ("llama", "lora", {"tune_a": True}),
    ("llama", "prefix", {}),
    ("gemma3_text", "prefix", {}),
    ("mistral", "lora", {}),
    ("gpt2", "lora", {}),
    ("gpt2", "prefix", {}),
]


def theta_of(directory: Path, start: Path, **settings: Any) -> Theta:
    """Of three directions that change answers."""
    return make_theta(directory, start, directions=3, batch=3, eps=2**-1, **settings)


def stacked(theta: Theta, directions: list[Direction], copy_bytes: int = 1, **options: Any) -> list[list[list[str]]]:
    def beginnings(chosen: Any, sides: Any) -> Beginning:
        return perturbed_beginning(theta.model, theta.weights, [directions[index] for index in chosen], sides, theta.weights.eps)

    return generate_stacked(theta.model, GROUPS, SIDES, beginnings, copy_bytes, COUNT, **options)


def batches(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Grows by the shape of every forward of the generation graph."""
    shapes: list[tuple[int, ...]] = []
    run = model.generation.run

    def counted(outputs: list[str], feeds: Any) -> Any:
        shapes.append(feeds["input_ids"].shape)
        return run(outputs, feeds)

    monkeypatch.setattr(model.generation, "run", counted)
    return shapes


@pytest.mark.parametrize(("name", "kind", "settings"), CASES)
@pytest.mark.parametrize("stops", [False, True])
def test_answers_are_those_of_each_copy_alone(
    export_tiny: ExportTiny, tmp_path: Path, name: str, kind: str, settings: dict[str, Any], stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    theta = theta_of(export_tiny(name, adapter=kind), tmp_path / "start", **settings)
    directions, before, stop = step_directions(theta.config, 5), digest(theta.model), "e" if stops else None
    expected: list[list[list[str]]] = []
    for direction, prompts in zip(directions, GROUPS, strict=True):
        expected.append([])
        for side in SIDES:
            with perturbed(theta, direction, side):
                expected[-1].append(generate_batch(theta.model, prompts, COUNT, stop))
    assert sum(plus != minus for plus, minus in expected) == 3
    shapes = batches(theta.model, monkeypatch)
    counts = []
    for batch_tokens in (1, 2 * 3 * 16, BATCH_TOKENS):
        shapes.clear()
        assert stacked(theta, directions, stop=stop, batch_tokens=batch_tokens) == expected, batch_tokens
        assert max(rows * (width + COUNT) for rows, width in shapes) <= max(batch_tokens, 2 * 16)  # 16: the longest with its answer
        counts.append(len(shapes))
    assert counts == sorted(counts, reverse=True)
    assert digest(theta.model) == before


def test_all_copies_share_forwards_and_leave_when_they_are_done(lora_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theta = theta_of(lora_dir, tmp_path / "start")
    assert isinstance(theta.model.adapter, Lora)
    directions, fed = step_directions(theta.config, 5), theta.model.adapter.targets[0].b
    whole = Counter("".join(text for group in stacked(theta, directions) for side in group for text in side))
    stop = whole.most_common(1)[0][0]
    expected = stacked(theta, directions, stop=stop, batch_tokens=1)
    places: list[int] = []
    copies: list[int] = []
    run = theta.model.generation.run

    def counted(outputs: list[str], feeds: Any) -> Any:
        places.append(len(feeds["input_ids"]))
        copies.append(len(feeds[fed]))
        return run(outputs, feeds)

    monkeypatch.setattr(theta.model.generation, "run", counted)
    assert stacked(theta, directions, stop=stop) == expected
    lengths = [[len(text) for text in side] for group in expected for side in group]
    assert any(len(set(side)) > 1 for side in lengths)  # rows of one copy end at different tokens
    assert (places[0], copies[0]) == (18, 6)
    for numbers in (places, copies):
        assert numbers == sorted(numbers, reverse=True)
        assert numbers[-1] < numbers[0]
    assert len(places) <= COUNT


@pytest.mark.parametrize(("copy_bytes", "most"), [(COPIES_BYTES // 4, 4), (COPIES_BYTES, 2)])
def test_copies_of_a_forward_are_bounded(
    lora_dir: Path, tmp_path: Path, copy_bytes: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides of one direction go together whatever they take."""
    theta = theta_of(lora_dir, tmp_path / "start")
    directions = step_directions(theta.config, 5)
    expected, shapes = stacked(theta, directions), batches(theta.model, monkeypatch)
    assert stacked(theta, directions, copy_bytes) == expected
    assert max(rows for rows, _ in shapes) == 3 * most


def objective_under(theta: Theta, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Gives theta an objective that every other answer changes; returns three groups of rows."""
    rows = [{"prompt": prompt, "answer": "x"} for prompt in ("it", "the film was a good", "a plot and a film", "no", "good good", "so")]
    objective, examples = objective_of(theta.model, rows, objective="f1", max_tokens=COUNT)

    def loss(self: Objective, group: Any, texts: list[str]) -> float:
        return float(np.mean([sum(map(ord, text)) % 97 / 97 for text in texts]))

    monkeypatch.setattr(Objective, "_generated_loss", loss)
    theta.objective = objective
    return [examples[:2], examples[2:4], examples[4:]]


@pytest.mark.parametrize("estimator", ["two-sided", "one-sided"])
@pytest.mark.parametrize(
    ("kind", "settings"), [("lora", {}), ("lora", {"sampler": "layers", "share": 0.5}), ("prefix", {"noise": "gaussian"})]
)
def test_estimates_are_those_made_in_place(
    adapter_dirs: dict[str, Path],
    tmp_path: Path,
    kind: str,
    settings: dict[str, Any],
    estimator: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theta = theta_of(adapter_dirs[kind], tmp_path / "start", **settings)
    groups, directions, before = objective_under(theta, monkeypatch), step_directions(theta.config, 3), digest(theta.model)
    if ESTIMATORS[estimator].shared:
        groups = [groups[0]] * 3
    shapes = batches(theta.model, monkeypatch)
    counted = theta.sequences = theta.objective.sequences
    found = theta.estimates(directions, groups, estimator=ESTIMATORS[estimator])
    evaluations = 3 * len(ESTIMATORS[estimator].sides) + ESTIMATORS[estimator].shared
    assert counted.forward_rows == 2 * evaluations
    assert max(rows for rows, _ in shapes) == 3 * 2 * len(ESTIMATORS[estimator].sides)
    assert digest(theta.model) == before
    monkeypatch.setattr(EdgeModel, "generates_copies", False)
    shapes.clear()
    in_place = theta.estimates(directions, groups, estimator=ESTIMATORS[estimator])
    assert max(rows for rows, _ in shapes) == 2
    assert counted.forward_rows == 4 * evaluations
    assert np.array(found) == pytest.approx(np.array(in_place), abs=1e-6, nan_ok=True)
    assert all(estimate.projected_grad for estimate in found)


def test_an_older_edge_model_writes_under_one_copy_after_the_other(
    lora_dir: Path, prefix_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert theta_of(lora_dir, tmp_path / "start").model.generates_copies
    monkeypatch.setattr(edge_model, "COPIES_VERSION", 99)  # its manifest is of a version before
    theta = theta_of(lora_dir, tmp_path / "start")
    groups = objective_under(theta, monkeypatch)
    shapes = batches(theta.model, monkeypatch)
    theta.estimates(step_directions(theta.config, 0), groups)
    assert max(rows for rows, _ in shapes) == 2
    assert theta_of(prefix_dir, tmp_path / "other").model.generates_copies
    assert not EdgeModel(lora_dir, threads=1).generates_copies
    data, notices = tmp_path / "rows.jsonl", list[str]()
    data.write_text("".join(f'{{"prompt": "the film {number}", "answer": "good"}}\n' for number in range(4)))
    settings: dict[str, Any] = {"start": "none", "steps": 1, "directions": 2, "batch": 1, "eps": 0.1, "lr": 1e-3, "max_tokens": 2}
    monkeypatch.setitem(device_module.DEVICES, "cuda", device_module.Device("cpu", "CPUExecutionProvider", {}))
    for number, (directory, device, told) in enumerate([(lora_dir, "cpu", 1), (prefix_dir, "cpu", 0), (lora_dir, "cuda", 0)]):
        edgezo.tune(
            directory,
            tmp_path / f"run{number}",
            data=str(data),
            objective="f1",
            device=device,
            **settings,
            reporter=edgezo.Reporter(notice=notices.append),
        )
        assert sum("export again for faster steps" in line for line in notices) == told
        notices.clear()
