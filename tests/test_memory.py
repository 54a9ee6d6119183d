"""Memory: sizes as text, batches planned from forwards that grow, and the warning about a loss that is not smooth."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import make_examples, make_objective

import edgezo
from edgezo.config import make_config
from edgezo.errors import ConfigError
from edgezo.runtime import memory
from edgezo.runtime.estimators.estimator import Estimate
from edgezo.runtime.examples import Example
from edgezo.runtime.memory import RESERVE, fit_batches, parse_bytes
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.scoring import BATCH_TOKENS, Sequences
from edgezo.runtime.smoothness import smoothness_warning
from edgezo.runtime.theta import Theta, mutable_weights, step_directions
from edgezo.runtime.tune import Reporter

TASK = {"template": "{text} It was", "labels": "terrible,great", "threads": 1}


# sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1.5GB", 1_500_000_000),
        ("800MB", 800_000_000),
        ("2GiB", 2 << 30),
        ("512 MiB", 512 << 20),
        ("64000kb", 64_000_000),
        ("10240KiB", 10 << 20),
        (" 7000000 ", 7_000_000),
        ("1000000B", 1_000_000),
        ("0.5gb", 500_000_000),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GB",
        "1.5.2GB",
        "-1GB",
        "0",
        "1TB",
        "1e9",
        "1,5GB",
        "one",
        "1GBB",
        "1G",
        "1.5I",
        "nan",
        "٣GB",
        "1.5",
        " 7 ",
    ],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_bytes(text)
    assert str(caught.value) == f"--memory {text!r}: give a size with its unit, as 1.5GB or 800MB"


@pytest.mark.parametrize(("text", "size"), [("0MB", 0), ("999999B", 999999), ("64kb", 64000), ("0.5MB", 500000)])
def test_a_size_that_holds_no_model_is_refused(text: str, size: int) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_bytes(text)
    assert str(caught.value) == f"--memory {text!r}: is {size} bytes, in which no model fits; give a size as 1.5GB or 800MB"


def test_the_peak_of_a_process_grows_with_what_it_takes_and_stays() -> None:
    """In a process of its own: this one has had a peak of any size."""
    script = (
        "import numpy as np\nfrom edgezo.runtime.machine import peak_bytes\nfirst = peak_bytes()\n"
        "np.ones(16_000_000).sum()\nsecond = peak_bytes()\nnp.ones(100).sum()\nprint(first, second, peak_bytes())"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    first, second, third = map(int, found.stdout.split())
    assert 20e6 < first < 2e9
    assert second == pytest.approx(first + 128e6, abs=30e6)
    assert third == pytest.approx(second, abs=5e6)


# batches


@pytest.fixture
def make_theta(exported_dir: Path, lora_dir: Path, prefix_dir: Path) -> Callable[..., Theta]:
    def make(kind: str, **settings: Any) -> Theta:
        model = EdgeModel({"full": exported_dir, "lora": lora_dir, "prefix": prefix_dir}[kind], threads=1)
        defaults: dict[str, Any] = {
            "data": "no file",
            "eps": 1e-2 if kind == "lora" else 1e-1 if kind == "prefix" else 1e-3,
            **({"rank": 2} if kind == "lora" else {}),
        }
        config = make_config(None, {**defaults, **settings}, None if kind == "full" else kind)  # type: ignore[arg-type]
        return Theta(model, config, mutable_weights(model, config), make_objective(Sequences(model)))

    return make


class Engine:
    """A made-up memory: what a forward takes grows with its tokens, and the process remembers the most."""

    def __init__(self, theta: Theta, monkeypatch: pytest.MonkeyPatch, base: float, per_token: float, power: float = 1.0) -> None:
        self.base, self.per_token, self.power = base, per_token, power
        self.tokens: list[int] = []
        run = theta.model.scoring.run

        def counted(outputs: list[str], feeds: dict[str, Any]) -> list[Any]:
            self.tokens.append(feeds["input_ids"].size)
            return run(outputs, feeds)

        theta.model.scoring.run = counted  # type: ignore[method-assign]
        monkeypatch.setattr(memory, "peak_bytes", self.peak)

    def needs(self, tokens: float) -> float:
        return self.base + self.per_token * tokens**self.power

    def peak(self) -> int:
        return int(self.needs(max(self.tokens, default=0)))


WIDTH = 11  # tokens of the longest of these rows
KINDS = ["full", "lora", "prefix"]


def make_rows(count: int = 64) -> list[Example]:
    rows = make_examples(count)
    assert max(len(prompt) + len(word) - 1 for row in rows for prompt, word in row.pairs) == WIDTH
    return rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("room", [25, 60, 130, 333, 700, 1500, 5000])
def test_no_forward_exceeds_the_limit_and_most_of_it_is_used(
    make_theta: Callable[..., Theta], monkeypatch: pytest.MonkeyPatch, kind: str, room: int
) -> None:
    theta = make_theta(kind, directions=16, batch=4)
    before = [array.tobytes() for array in theta.model.weights.values()]
    engine = Engine(theta, monkeypatch, base=5e8, per_token=1e6)
    rows = make_rows()
    limit = int(engine.needs(room) / (1 - RESERVE)) + 1
    found = fit_batches(theta, rows, limit)
    assert found == theta.sequences.batch_tokens
    assert max(engine.tokens) <= room, "while measuring"
    assert min(room, BATCH_TOKENS) * 0.45 <= found <= min(room, BATCH_TOKENS)
    assert [array.tobytes() for array in theta.model.weights.values()] == before
    engine.tokens.clear()
    theta.estimates(step_directions(theta.config, 0), theta.groups(rows))
    theta.weights.flush()
    assert max(engine.tokens) <= room, "in the run"
    everything = theta.config.batch * WIDTH if kind == "full" else 2 * theta.config.rows * WIDTH
    assert max(engine.tokens) >= min(found, everything) * 0.4


@pytest.mark.parametrize("power", [0.5, 0.8, 1.0])
def test_no_forward_exceeds_the_limit_when_larger_ones_take_less_a_token(
    make_theta: Callable[..., Theta], monkeypatch: pytest.MonkeyPatch, power: float
) -> None:
    for room in (40, 200, 1000):
        theta = make_theta("lora", directions=16, batch=4)
        engine = Engine(theta, monkeypatch, base=5e8, per_token=1e6, power=power)
        limit = int(engine.needs(room) / (1 - RESERVE)) + 1
        found = fit_batches(theta, make_rows(), limit)
        assert max(engine.tokens) <= room, (power, room)
        assert found <= room, (power, room)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_that_fit_give_the_same_estimates(make_theta: Callable[..., Theta], monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    theta = make_theta(kind, directions=8, batch=4, **({} if kind == "full" else {"eps": 2**-5}))
    rows = make_rows()
    directions = step_directions(theta.config, 3)
    expected = np.array(theta.estimates(directions, theta.groups(rows)))
    theta.weights.flush()
    engine = Engine(theta, monkeypatch, base=5e8, per_token=1e6)
    assert fit_batches(theta, rows, int(engine.needs(80) / (1 - RESERVE)) + 1) < 100
    engine.tokens.clear()
    found = np.array(theta.estimates(directions, theta.groups(rows)))
    assert np.abs(found[:, 1] - expected[:, 1]).max() < 1e-5
    assert len(engine.tokens) > 8


def test_memory_that_does_not_grow_leaves_forwards_as_large_as_they_gain_speed(
    make_theta: Callable[..., Theta], monkeypatch: pytest.MonkeyPatch
) -> None:
    theta = make_theta("lora")
    engine = Engine(theta, monkeypatch, base=5e8, per_token=0)
    assert fit_batches(theta, make_rows(512), int(6e8)) == BATCH_TOKENS
    assert max(engine.tokens) <= BATCH_TOKENS


@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_below_the_model_alone_is_refused(make_theta: Callable[..., Theta], monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    theta = make_theta(kind)
    engine = Engine(theta, monkeypatch, base=5e8, per_token=1e6)
    with pytest.raises(ConfigError) as caught:
        fit_batches(theta, make_rows(), 510_000_000)
    assert str(caught.value) == (
        "--memory 510MB: the model alone takes 500MB; give more, or export with --adapter lora --weights int8 or int4"
    )
    assert not engine.tokens


@pytest.mark.parametrize(("kind", "copies"), [("full", 1), ("lora", 2), ("prefix", 2)])
def test_a_limit_below_one_row_is_refused_with_what_would_fit(
    make_theta: Callable[..., Theta], monkeypatch: pytest.MonkeyPatch, kind: str, copies: int
) -> None:
    theta = make_theta(kind)
    engine = Engine(theta, monkeypatch, base=5e8, per_token=1e7)
    rows = make_rows()
    with pytest.raises(ConfigError) as caught:
        fit_batches(theta, rows, 550_000_000)
    takes = engine.needs(copies * WIDTH)
    enough = re.fullmatch(
        rf"--memory 550MB: a step with one row of {WIDTH} tokens takes {takes / 1e6:.0f}MB; give --memory ([0-9]+MB), or shorten rows with --max-length",
        str(caught.value),
    )
    assert enough is not None
    theta = make_theta(kind)
    engine = Engine(theta, monkeypatch, base=5e8, per_token=1e7)
    assert fit_batches(theta, rows, parse_bytes(enough[1])) >= copies * WIDTH
    assert engine.peak() <= parse_bytes(enough[1])


def test_a_system_that_does_not_tell_is_refused(make_theta: Callable[..., Theta], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "peak_bytes", lambda: None)
    with pytest.raises(ConfigError) as caught:
        fit_batches(make_theta("lora"), make_rows(), 1 << 30)
    assert str(caught.value) == (
        "--memory: this system does not tell how much memory a process takes; leave it out and lower --batch and --max-length"
    )


def test_a_run_tells_the_size_of_its_forwards_and_keeps_its_numbers(lora_dir: Path, reviews: str, tmp_path: Path) -> None:
    notices: list[str] = []
    settings = {"data": reviews, "steps": 3, "directions": 4, "batch": 2, **TASK}
    edgezo.tune(lora_dir, tmp_path / "free", **settings)
    result = edgezo.tune(lora_dir, tmp_path / "bound", memory="64GB", reporter=Reporter(notice=notices.append), **settings)
    assert len([notice for notice in notices if re.fullmatch(r"forwards of at most [0-9]+ tokens keep to 64000 MB", notice)]) == 1
    assert result.peak_bytes is not None
    assert result.peak_bytes < 64e9
    with pytest.raises(ConfigError, match=r"^--memory 2MB: the model alone takes [0-9]+MB; give more, or export with"):
        edgezo.tune(lora_dir, tmp_path / "small", memory="2MB", **settings)
    assert not (tmp_path / "small").exists()
    tuned = [EdgeModel(lora_dir, run=tmp_path / name, threads=1).adapter for name in ("free", "bound")]
    assert np.abs(tuned[0].b - tuned[1].b).max() < 1e-3  # type: ignore[union-attr]


# smoothness


def round_losses(theta: Theta, step: float) -> None:
    """Let the theta's losses be multiples of `step`, as those of integer arithmetic are."""
    exact = theta.estimates

    def rounded(directions: Any, groups: Any, eps: float | None = None) -> list[Estimate]:
        used = theta.weights.eps if eps is None else eps
        found = []
        for estimate in exact(directions, groups, eps):
            plus, minus = (round((estimate.loss + side * used * estimate.projected_grad) / step) * step for side in (1, -1))
            found.append(Estimate((plus - minus) / (2 * used), (plus + minus) / 2))
        return found

    theta.estimates = rounded  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps", [1e-3, 1e-4])
def test_a_smooth_loss_gives_no_warning(make_theta: Callable[..., Theta], kind: str, eps: float) -> None:
    theta = make_theta(kind, eps=eps)
    before = [array.tobytes() for array in theta.model.weights.values()]
    assert smoothness_warning(theta, make_rows()) is None
    theta.weights.flush()
    assert [array.tobytes() for array in theta.model.weights.values()] == before


WARNING = re.compile(
    r"the loss is not smooth at eps (?P<eps>\S+): projected gradients of (?P<count>\d+) directions are (?P<half>\S+) at eps / 2 "
    r"and (?P<double>\S+) at 2 eps \(root mean square\) and differ by (?P<change>\d+) %; (?P<advice>.+)"
)
ROUNDING = "rounding drowns the difference of losses, try a larger --eps"
CURVATURE = "the loss curves, try a smaller --eps"


@pytest.mark.parametrize("step", [0.2, 1.0, 1e6])  # losses of one row differ by as much as 0.2
@pytest.mark.parametrize(("kind", "eps"), [("full", 2e-4), ("lora", 2e-3), ("prefix", 3e-3)])
def test_rounded_losses_are_warned_of_with_numbers(make_theta: Callable[..., Theta], kind: str, eps: float, step: float) -> None:
    """Rounded so far that many do not change at all, or that none does."""
    theta = make_theta(kind, eps=eps, directions=6, batch=2)
    assert smoothness_warning(theta, make_rows()) is None
    round_losses(theta, step)
    warning = smoothness_warning(theta, make_rows())
    assert warning is not None
    found = WARNING.fullmatch(warning)
    assert found is not None
    assert float(found["eps"]) == pytest.approx(eps, rel=0.02)
    assert found["count"] == "6"
    assert found["advice"] == ROUNDING
    if step < 1:
        assert int(found["change"]) > 50


@pytest.mark.parametrize(("kind", "eps"), [("full", 0.1), ("full", 1.0), ("lora", 0.1), ("lora", 1.0), ("prefix", 1.0), ("prefix", 30.0)])
def test_an_eps_where_the_loss_curves_is_warned_of(make_theta: Callable[..., Theta], kind: str, eps: float) -> None:
    """Far out the losses are all alike, so that projected gradients fall with eps as they do by rounding."""
    warning = smoothness_warning(make_theta(kind, eps=eps), make_rows())
    assert warning is not None
    found = WARNING.fullmatch(warning)
    assert found is not None
    assert found["advice"] == CURVATURE


@pytest.mark.parametrize(("step", "asked"), [(None, [2, 2]), (0.2, [2, 2, 4, 4, 6, 6])])
def test_two_directions_are_enough_where_they_agree(make_theta: Callable[..., Theta], step: float | None, asked: list[int]) -> None:
    theta, found = make_theta("lora", eps=2e-3, directions=6, batch=2), list[int]()
    if step is not None:
        round_losses(theta, step)
    inner = theta.estimates
    theta.estimates = lambda directions, *given: (found.append(len(directions)), inner(directions, *given))[1]  # type: ignore[method-assign]
    assert (smoothness_warning(theta, make_rows()) is None) == (step is None)
    assert found == asked


def test_few_rows_are_enough_to_probe(make_theta: Callable[..., Theta]) -> None:
    for count in (1, 2, 5):
        assert smoothness_warning(make_theta("lora", eps=2**-8), make_rows(count) if count > 5 else make_examples(count)) is None


def test_a_run_warns_when_it_starts_and_not_when_it_goes_on(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    notices: list[str] = []
    settings = {"threads": 1, "reporter": Reporter(notice=notices.append)}
    start = {"start": "none", "valid_share": 0.0}
    edgezo.tune(exported_dir, tmp_path / "run", data=reviews, steps=1, batch=4, eps=2.0, lr=1e-9, **{**TASK, **settings, **start})
    (warning,) = notices[2:]  # after what was understood of the rows
    assert warning.startswith("warning: the loss is not smooth at eps 2: ")
    notices.clear()
    edgezo.tune(exported_dir, tmp_path / "run", resume=True, steps=2, **settings)
    assert [notice.split(",")[0] for notice in notices] == ["going on after step 1 of 2 (1 before)"]


def test_a_limit_below_the_weights_is_refused_before_anything_is_done(exported_dir: Path, tmp_path: Path, reviews: str) -> None:
    weights = sum((exported_dir / name).stat().st_size for name in ("tunable.bin",))
    with pytest.raises(
        ConfigError, match=r"^--memory 0MB: the weights alone take 0MB; give more, or export with --adapter lora --weights int8 or int4$"
    ):
        edgezo.tune(exported_dir, tmp_path / "run", data=reviews, memory=weights - 1, **TASK)
    assert not (tmp_path / "run").exists()


GATHERED = """
import sys
import numpy as np, onnx
from onnx import TensorProto, helper
from edgezo.runtime.machine import peak_bytes
from edgezo.runtime.session import session_options
import onnxruntime

layers, size = 24, 1 << 20
nodes, value = [], "x"
for layer in range(layers):
    nodes.append(helper.make_node("Sin", [value], [f"y{layer}"]))
    nodes.append(helper.make_node("Gather", [f"y{layer}", "rows"], [f"rows{layer}"], axis=0))
    value = f"y{layer}"
nodes.append(helper.make_node("ReduceMax", [value], ["largest"], keepdims=0))
nodes.append(helper.make_node("Concat", [f"rows{layer}" for layer in range(layers)], ["all"], axis=0))
ins = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [size]), helper.make_tensor_value_info("rows", TensorProto.INT64, ["n"])]
outs = [helper.make_tensor_value_info("largest", TensorProto.FLOAT, []), helper.make_tensor_value_info("all", TensorProto.FLOAT, ["m"])]
model = helper.make_model(helper.make_graph(nodes, "g", ins, outs), opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
session = onnxruntime.InferenceSession(model.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"])
feeds = {"x": np.ones(size, np.float32), "rows": np.zeros(1, np.int64)}
before = peak_bytes()
session.run(["all"], feeds)
print((peak_bytes() - before) // (4 * size))
"""


def test_tensors_of_which_rows_are_gathered_beside_the_scores_do_not_stay() -> None:
    found = subprocess.run([sys.executable, "-c", GATHERED], capture_output=True, text=True, check=True)
    assert int(found.stdout) <= 6  # of 24
