"""Settings that make no sense: none ends below its start; each learns, stays, or stops with one line."""

from pathlib import Path
from typing import Any

import pytest

import edgezo
from edgezo.errors import DivergenceError
from edgezo.runtime.run import read_run
from edgezo.runtime.watch import worse_than_start

TASK: dict[str, Any] = {"template": "{text} It was", "labels": "terrible,great", "start": "none", "threads": 1}
OVERRIDES: dict[str, dict[str, Any]] = {
    "none": {},
    "lr x 1000": {"lr": 1000.0},
    "lr x 30": {"lr": 30.0},
    "lr / 1000": {"lr": 1 / 1000},
    "eps x 1000": {"eps": 1000.0},
    "eps / 1000": {"eps": 1 / 1000},
    "one direction of one row": {"directions": 1, "batch": 1},
    "many directions": {"directions": 16, "batch": 4},
    "seed": {"seed": 2**64 - 1},
    "sgd with a normalized lr": {"rule": "sgd", "lr": 0.02},
    "normalized with an lr of sgd": {"rule": "normalized", "lr": 2e-5},
    "constant schedule": {"schedule": "constant"},
    "warm-up of half the run": {"warmup": 0.5},
    "weight decay": {"weight_decay": 1.0},
    "rank 1": {"rank": 1},
    "A and B": {"tune_a": True},
}
LORA_ALONE = {"rank 1", "A and B"}
CASES = [
    (edge, name)
    for edge in ("exported_dir", "lora_dir", "prefix_dir")
    for name in OVERRIDES
    if edge == "lora_dir" or name not in LORA_ALONE
]


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, float]]:
    """eps and lr of a run without settings, by edge model."""
    return {}


@pytest.mark.parametrize(("edge", "name"), CASES)
def test_no_setting_ends_below_its_start(
    request: pytest.FixtureRequest, measured: dict[str, dict[str, float]], edge: str, name: str, reviews: str, tmp_path: Path
) -> None:
    directory, run = request.getfixturevalue(edge), tmp_path / "run"
    common = {"data": reviews, "valid": reviews, "steps": 40, "eval_every": 20, **TASK}
    if edge not in measured:
        edgezo.tune(directory, tmp_path / "measured", **common)
        config = read_run(tmp_path / "measured").config
        measured[edge] = {"eps": config.eps or 0.0, "lr": config.lr or 0.0}
    given = dict(OVERRIDES[name])
    for setting in ("eps", "lr"):
        if setting in given and "rule" not in given:
            given[setting] *= measured[edge][setting]
    try:
        edgezo.tune(directory, run, **common, **given)
    except DivergenceError as error:
        assert str(error).startswith(f"{run}: diverged 8 times, the last time: step ")
    evaluations = read_run(run).evaluations
    assert not worse_than_start(evaluations[0], evaluations[max(evaluations)])
    best = evaluations[read_run(run).best_step]
    assert best.score() >= evaluations[0].score()
    if name in {"none", "seed", "rank 1"}:
        assert best.loss < 0.9 * evaluations[0].loss
