"""One contract for every estimator, rule and sampler, and for all that compose: a new method is a row of a table and nothing here."""

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quadratic import EPS, LAYERS, NOISY, Quadratic, configure, scalars

import edgezo
from edgezo.config import SCALARS, SHARING, choices_of
from edgezo.errors import ConfigError, NonFiniteLossError
from edgezo.runtime import passes as passes_module
from edgezo.runtime.calibration import forward_rows
from edgezo.runtime.check import check_run
from edgezo.runtime.estimators import ESTIMATORS
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.noise import BLOCK, Direction
from edgezo.runtime.optimizer import zo_step
from edgezo.runtime.reports import Reporter
from edgezo.runtime.rules import RULES
from edgezo.runtime.run import read_run
from edgezo.runtime.samplers import SAMPLERS, Tunables, make_sampler
from edgezo.runtime.tuner import Tuner
from edgezo.runtime.weights import MutableWeights

DOCS = Path(__file__).parent.parent / "docs" / "methods.md"
# learning rates for the quadratic, whose curvature is about 1 and whose gradient about 10 long
LR = {
    "sgd": 0.04,
    "normalized": 0.1,
    "sign": 0.25,
    "fzoo": 0.2,
    "meazo": 0.1,
    "momentum": 0.04,
    "adam": 0.1,
    "conservative": 0.08,
    "svrg": 0.03,
    "hizoo": 0.04,
}
COMPOSED = [(rule, estimator) for rule in RULES for estimator in ESTIMATORS if rule != "hizoo" or estimator == "curvature"]


def test_every_choice_of_the_settings_is_a_row_of_its_table() -> None:
    assert choices_of("rule") == tuple(RULES) == tuple(LR)
    assert choices_of("estimator") == tuple(ESTIMATORS)
    assert choices_of("sampler") == tuple(SAMPLERS)


def test_every_method_is_in_the_docs() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for name in (*RULES, *ESTIMATORS, *SAMPLERS, *choices_of("noise")):
        assert f"| `{name}` |" in text, name


# whole steps


@pytest.mark.parametrize(("sampler", "noise"), NOISY)
@pytest.mark.parametrize(("rule", "estimator"), COMPOSED)
def test_steps_lower_a_quadratic_and_a_replay_gives_their_bits(rule: str, estimator: str, sampler: str, noise: str) -> None:
    config = configure(rule, estimator, sampler, noise, weight_decay=1e-3)
    problem, again = Quadratic(config), Quadratic(config, threads=2)
    before, start = problem.loss(), problem.digest
    problem.run(25, LR[rule])
    assert problem.loss() < (0.8 if sampler == "full" else 0.9) * before
    again.replay(problem.records)
    assert again.digest == problem.digest != start


@pytest.mark.parametrize(("rule", "estimator"), COMPOSED)
def test_a_run_that_goes_on_from_its_records_is_the_run_that_never_stopped(rule: str, estimator: str) -> None:
    whole, parts = (Quadratic(configure(rule, estimator)) for _ in range(2))
    whole.run(9, LR[rule])
    parts.replay(whole.records[:5])  # in the middle of what svrg keeps
    parts.run(4, LR[rule])
    assert parts.records == whole.records[5:]
    assert parts.digest == whole.digest


@pytest.mark.parametrize(("sampler", "noise"), NOISY)
@pytest.mark.parametrize("rule", RULES)
def test_the_same_scalars_give_the_same_bits_on_any_threads_in_any_pieces(
    rule: str, sampler: str, noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {"layers.0.w": (300, 500), "layers.1.w": (7, BLOCK // 5), "norm": (40,)}
    random = np.random.default_rng(0)
    records = [(scalars(rule, np.float32(random.standard_normal(3) * 10).tolist()), 1e-3) for _ in range(5)]
    digests = set()
    for threads, run_blocks in ((1, 16), (2, 1), (3, 2)):
        monkeypatch.setattr(passes_module, "RUN_BLOCKS", run_blocks)
        problem = Quadratic(configure(rule, sampler=sampler, noise=noise, directions=3), threads, shapes)
        problem.replay(records)
        digests.add(problem.digest)
    assert len(digests) == 1


@pytest.mark.parametrize("rule", RULES)
def test_a_journal_has_room_for_what_a_rule_takes(rule: str) -> None:
    problem = Quadratic(configure(rule, directions=3))
    assert len(problem.measure(0.01)) == 3 * SCALARS.get(rule, 1)


@pytest.mark.parametrize("rule", RULES)
def test_a_learning_rate_scales_the_first_step(rule: str) -> None:
    moved = {}
    for lr in (0.0, 1e-3, 2e-3):
        problem = Quadratic(configure(rule))
        before = problem.theta
        problem.replay([(scalars(rule, [3.0, -4.0, 0.5, 1.0]), lr)])
        moved[lr] = problem.theta - before
    assert not moved[0.0].any()
    assert np.abs(moved[1e-3]).max() > 1e-5
    assert moved[2e-3] == pytest.approx(2 * moved[1e-3], abs=1e-6)


@pytest.mark.parametrize("fault", ["raise", "nan"])
@pytest.mark.parametrize(("rule", "estimator"), COMPOSED)
def test_a_failing_loss_leaves_theta_as_it_was(rule: str, estimator: str, fault: str) -> None:
    """At every call of the loss, in the first step and in one after it."""
    for done in (0, 1):
        counted = Quadratic(configure(rule, estimator, directions=2))
        counted.run(done, LR[rule])
        counted.calls = 0
        counted.measure(LR[rule])
        for call in range(1, counted.calls + 1):
            problem = Quadratic(configure(rule, estimator, directions=2), threads=1)
            problem.run(done, LR[rule])
            before = problem.digest
            problem.calls, problem.fails_at, problem.fault = 0, call, fault
            if fault == "nan" and rule == "conservative" and call > counted.calls - 3:
                problem.measure(LR[rule])  # a trial that is not finite is not chosen
            else:
                with pytest.raises((RuntimeError, NonFiniteLossError), match=r"engine out of memory|step \d: the loss at theta.* is nan"):
                    problem.measure(LR[rule])
            problem.weights.flush()
            assert problem.digest == before, call
    assert counted.calls >= ESTIMATORS[estimator].forwards(2)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_step_costs_the_forwards_it_says(estimator: str) -> None:
    problem = Quadratic(configure(estimator=estimator, directions=5))
    problem.run(1, 0.01)
    assert problem.calls == ESTIMATORS[estimator].forwards(5) == {"two-sided": 10, "one-sided": 6, "curvature": 11}[estimator]


# estimators


@pytest.mark.parametrize("name", ["two-sided", "one-sided"])
def test_an_estimate_is_unbiased_over_all_signs(name: str) -> None:
    """Exactly, on a quadratic: the mean of g z over all 2^6 sign vectors is the gradient."""
    random = np.random.default_rng(0)
    gradient, root = random.standard_normal(6), random.standard_normal((6, 6))
    estimator, eps = ESTIMATORS[name], 0.25
    z = np.array(list(itertools.product((1.0, -1.0), repeat=6)))
    losses = np.array([[eps * side * (row @ gradient) + 0.5 * eps**2 * ((root @ row) ** 2).sum() for side in estimator.sides] for row in z])
    directions = [Direction(0, 0, number) for number in range(len(z))]
    grads = np.array([estimate.projected_grad for estimate in estimator.estimates(losses, 0.0, directions, eps)])
    assert (grads @ z) / len(z) == pytest.approx(gradient)


def test_curvature_weighs_a_direction_down_where_the_loss_curves() -> None:
    estimator, eps = ESTIMATORS["curvature"], 0.5
    losses = np.array([[1 + eps * 3 + 0.5 * eps**2 * c, 1 - eps * 3 + 0.5 * eps**2 * c] for c in (0.0, 0.5, 1024.0, -1024.0)])
    directions = [Direction(0, 0, number) for number in range(4)]
    found = [estimate.projected_grad for estimate in estimator.estimates(losses, 1.0, directions, eps)]
    assert found == pytest.approx([3, 3, 3 / 2, 3 / 2])  # 1024^0.1 = 2


# the bits, for ever: they are docs/noise.md and docs/journal.md as of noise version 1

BITS = {
    "sgd full rademacher": "6c10731b21ea9318",
    "normalized full rademacher": "cd1b51be44653b88",
    "sign full rademacher": "356588ba11dc5b99",
    "fzoo full rademacher": "3f1b8dbdce667254",
    "meazo full rademacher": "f06b4e7864b7f03e",
    "momentum full rademacher": "46bde18c57285ca5",
    "adam full rademacher": "6d9d734007e20cf1",
    "conservative full rademacher": "6c10731b21ea9318",
    "svrg full rademacher": "050c6d6fbb809ad3",
    "hizoo full rademacher": "74b656aaa45f7272",
    "hizoo full gaussian": "edbc31ba58e6c2c0",
    "sgd full gaussian": "7861fbcb8cd40e7b",
    "sgd full sphere": "c2193db228e79a0e",
    "sgd layers rademacher": "471ab44c185c2358",
    "sgd magnitude rademacher": "5681194ee35170e0",
    "sgd lozo rademacher": "b96264821d103be2",
    "sgd subzero rademacher": "9b23300a1fb72740",
    "sgd tezo rademacher": "731cb74249d0f2ba",
}


def bits_of(rule: str, sampler: str, noise: str) -> str:
    """SHA-256 of what three steps make of known values."""
    shapes = {"layers.0.w": (30, 50), "layers.1.w": (50, 20), "norm": (40,)}
    problem = Quadratic(configure(rule, sampler=sampler, noise=noise, directions=3, redraw_every=2, seed=7), shapes=shapes)
    arrays = {name: np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape) for name, shape in shapes.items()}
    sampler_made = make_sampler(problem.config, Tunables(shapes, LAYERS, arrays))
    weights = MutableWeights(arrays, eps=EPS, sampler=sampler_made)
    for step, grads in enumerate(([1.5, -2.0, 0.25], [0.5, 3.0, -1.0], [-0.125, 0.75, 2.0])):
        zo_step(weights, [Direction(7, step, number) for number in range(3)], scalars(rule, grads), 2.0**-6, problem.rule, 0.125)
    weights.flush()
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays.values())).hexdigest()[:16]


@pytest.mark.parametrize(
    ("rule", "sampler", "noise"),
    [*((rule, "full", "rademacher") for rule in RULES), ("hizoo", "full", "gaussian"), *(("sgd", *pair) for pair in NOISY[1:])],
)
def test_three_steps_give_the_same_bits_for_ever(rule: str, sampler: str, noise: str) -> None:
    assert bits_of(rule, sampler, noise) == BITS[f"{rule} {sampler} {noise}"]


# runs

TUNING: dict[str, Any] = {
    "start": "none",
    "template": "{text} It was",
    "labels": "terrible,great",
    "schedule": "constant",
    "eval_every": 3,
    "threads": 1,
}
LORA = {"eps": 1e-2, "lr": 1e-2, "directions": 4, "batch": 1}
FULL = {"eps": 1e-3, "lr": 1e-4, "directions": 2, "batch": 2}
RUNS = [
    *(("lora_dir", {**LORA, "rule": rule}) for rule in RULES if rule != "hizoo"),
    ("lora_dir", {**LORA, "rule": "hizoo", "estimator": "curvature"}),
    ("prefix_dir", {**LORA, "rule": "hizoo", "estimator": "curvature", "noise": "gaussian"}),
    *(("exported_dir", {**FULL, "rule": "hizoo", "estimator": "curvature", "directions": count, "noise": "gaussian"}) for count in (1, 2)),
    *(("lora_dir", {**LORA, "rule": "fzoo", "estimator": estimator, "batch": 3}) for estimator in ESTIMATORS),
    ("lora_dir", {**LORA, "sampler": "layers", "tune_a": True, "share": 0.5}),
    ("prefix_dir", {**LORA, "rule": "adam", "noise": "sphere"}),
    ("prefix_dir", {**LORA, "rule": "svrg", "sampler": "magnitude", "estimator": "one-sided"}),
    *(("exported_dir", {**FULL, "rule": rule}) for rule in ("meazo", "momentum", "adam", "conservative", "svrg")),
    *(("exported_dir", {**FULL, "estimator": estimator}) for estimator in ("one-sided", "curvature")),
    *(("exported_dir", {**FULL, "sampler": sampler, "noise": noise, "rule": "momentum"}) for sampler, noise in NOISY[2:]),
]


@pytest.mark.parametrize(
    ("edge", "settings"), RUNS, ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value
)
def test_a_run_is_its_journal(request: pytest.FixtureRequest, edge: str, settings: dict[str, Any], reviews: str, tmp_path: Path) -> None:
    """Stopped and resumed it is the run that never stopped, and forward passes at the replayed weights give its scalars again."""
    directory, extra = request.getfixturevalue(edge), {"anchor_every": 2, "anchor_batches": 2, "redraw_every": 2, **TUNING, **settings}
    for name, stops in (("whole", (7,)), ("parts", (3, 7))):
        for number, steps in enumerate(stops):
            given = {"steps": steps, "threads": 1}
            edgezo.tune(directory, tmp_path / name, **(given if number else {**extra, **given, "data": reviews}), resume=bool(number))
    whole, parts = (EdgeModel(directory, run=tmp_path / name, step="last", threads=2) for name in ("whole", "parts"))
    arrays = [[*model.weights.values(), *([model.adapter.a, model.adapter.b] if edge == "lora_dir" else [])] for model in (whole, parts)]  # type: ignore[union-attr]
    start = EdgeModel(directory, run=tmp_path / "whole", step=0, threads=1)
    moved = [start.adapter.b] if edge == "lora_dir" else start.weights.values()  # type: ignore[union-attr]
    assert all(np.array_equal(one, other) for one, other in zip(*arrays, strict=True))
    assert not all(
        np.array_equal(one, other) for one, other in zip(moved, arrays[0][-1:] if edge == "lora_dir" else arrays[0], strict=True)
    )
    findings = check_run(tmp_path / "whole", EdgeModel(directory, threads=1), every=1)
    assert (findings.problems, findings.derived) == ([], 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "magnitude"}, "--sampler magnitude: LoRA's B begins at zero; give --sampler layers, or leave it out"),
        ({"sampler": "tezo"}, "--sampler tezo: directions of LoRA are of rank one already; give --sampler layers, or leave it out"),
        ({"noise": "sphere"}, "--noise sphere: directions of LoRA are outer products of signs; leave it out"),
    ],
)
def test_samplers_that_lora_has_no_use_for_are_refused(
    lora_dir: Path, reviews: str, tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        edgezo.tune(lora_dir, tmp_path / "run", data=reviews, steps=1, **TUNING, **settings)
    assert str(caught.value) == message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("edge", "settings", "advice"),
    [
        ("exported_dir", FULL, "give --noise gaussian"),
        ("lora_dir", LORA, "take another rule"),
        ("exported_dir", {**FULL, "noise": "gaussian"}, None),
    ],
    ids=["signs", "lora", "normal"],
)
def test_hizoo_tells_that_signs_show_nothing_of_a_diagonal(
    request: pytest.FixtureRequest, reviews: str, tmp_path: Path, edge: str, settings: dict[str, Any], advice: str | None
) -> None:
    told: list[str] = []
    given = {**TUNING, **settings, "rule": "hizoo", "estimator": "curvature", "data": reviews}
    edgezo.tune(request.getfixturevalue(edge), tmp_path / "run", steps=1, reporter=Reporter(notice=told.append), **given)
    expected = f"--rule hizoo: directions of signs meet one curvature in all weights, so that it changes the rate alone; {advice}"
    assert [line for line in told if "of signs" in line] == ([expected] if advice is not None else [])


def test_a_rate_is_measured_for_hizoo_by_steps_that_are_taken_back(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    """The trial is replayed on another grid before it is looked at."""
    settings = {"rule": "hizoo", "estimator": "curvature", "noise": "gaussian", "directions": 1, "batch": 4, "hessian_smooth": 0.1}
    result = edgezo.tune(exported_dir, tmp_path / "run", data=reviews, steps=40, **TUNING, **settings)
    found = read_run(tmp_path / "run")
    assert result.steps == len(found.records) == 40
    assert found.config.eps is not None
    assert {"tried_steps", "reach"} <= set(found.header["calibration"]["trial"])
    assert all(len(record.projected_grads) == 2 for record in found.records)


def test_hizoo_is_refused_where_an_objective_changes_in_steps(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    settings = {**FULL, "rule": "hizoo", "estimator": "curvature", "noise": "gaussian", "objective": "accuracy"}
    with pytest.raises(ConfigError) as caught:
        edgezo.tune(exported_dir, tmp_path / "run", data=reviews, steps=1, **TUNING, **settings)
    assert str(caught.value) == "--rule hizoo: --objective accuracy changes in steps and has no curvature; take another rule"
    assert not (tmp_path / "run").exists()


def test_a_prefix_has_neither_layers_nor_matrices(prefix_dir: Path, reviews: str, tmp_path: Path) -> None:
    for sampler, what in (("layers", "belongs to a layer"), ("lozo", "is a matrix")):
        with pytest.raises(ConfigError) as caught:
            edgezo.tune(prefix_dir, tmp_path / "run", data=reviews, steps=1, sampler=sampler, **TUNING)
        assert str(caught.value) == f"--sampler {sampler}: none of the tunable tensors {what}; leave it out"


def test_eps_of_the_quadratic_is_on_every_grid() -> None:
    assert Quadratic(configure()).weights.eps == EPS


def test_the_configuration_knows_which_estimators_share_rows() -> None:
    assert set(SHARING) == {name for name, estimator in ESTIMATORS.items() if estimator.shared}


@pytest.mark.parametrize(("rule", "estimator"), COMPOSED)
def test_a_step_takes_the_rows_of_forward_that_are_said(
    lora_dir: Path, write_rows: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, estimator: str
) -> None:
    """Five steps, so that one of svrg in five is an anchor; rows that are scored between steps do not count."""
    monkeypatch.setattr(Tuner, "_look", lambda tuner: None)
    data = write_rows([{"prompt": f"{number} films", "completion": " are great"} for number in range(64)])
    methods: dict[str, Any] = {"rule": rule, "estimator": estimator, "directions": 2, "batch": 2, "start": "none", "valid_share": 0.0}
    edgezo.tune(lora_dir, tmp_path / "run", data=data, steps=5, eps=2**-6, lr=1e-3, threads=1, **methods)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    rows = [line["forward_rows"] for line in lines]  # before the first step and after each
    assert len(rows) == 6
    assert rows[-1] - rows[0] == 5 * forward_rows(read_run(tmp_path / "run").config)
