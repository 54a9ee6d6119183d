"""The proof, at the start of a run, that the engine sees a change of every tunable tensor.

Many tensors are proven with few runs. All of them are perturbed at once; a session made *afterwards* has read the changed bytes whatever
it folds, packs or copies, so its scores are what a live session must give. Then the session that will be used is made from the
unchanged bytes, the same change is written under it, and its scores must be equal to the last bit: a tensor frozen in it would
keep its old value and break the equality. The cost is one more session and three short forwards instead of one forward a tensor.
What the proof cannot tell is a tensor whose changes reach the scores multiplied by nothing but zero: both sessions agree on it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgezo.adapters import A_ROWS, A_SIGNS, B_ROWS, B_SIGNS, PREFIX, LoraTarget, prefix_inputs
from edgezo.errors import DeadTensorError, NonFiniteLossError
from edgezo.runtime import noise
from edgezo.runtime.graph_file import disconnected
from edgezo.runtime.lora import Lora
from edgezo.runtime.model import Array, EdgeModel
from edgezo.runtime.noise import Direction
from edgezo.runtime.samplers.full import Full
from edgezo.runtime.session import Session
from edgezo.runtime.weights import MutableWeights

PROBE = Direction(seed=0, step=(1 << 64) - 1)  # no run has this step
PROBE_COPIES = 64
PROBE_TOKENS = 8
COPY_TOKENS = 2  # one would hide queries and keys. Of SmolLM2-135M's 420 LoRA tensors the smallest change is 29,000 times rounding, 1,000,000 times with four


class _Proven(NamedTuple):
    """A graph to prove: its file, what to feed and to look at, and how to get its session, the one to use or a new one."""

    shown: str
    path: Path
    feeds: dict[str, Array]
    output: str
    use: Callable[[], Session]
    fresh: Callable[[], Session]

    def scores(self, session: Session) -> Array:
        """What the session gives at the weights of this moment."""
        return session.run([self.output], self.feeds)[0]


def prove_live(model: EdgeModel, weights: MutableWeights, generates: bool = False) -> None:
    """Refuse the model unless every tunable tensor is live in its scoring session. The weights are afterwards as before.

    An adapter is fed at every run, so nothing can freeze it; that each of its tensors reaches the scores is proven by copies that
    differ in one tensor each.

    Args:
        generates: whether the loss is of generated text: the generation session is proven too.

    Raises:
        DeadTensorError: names the tensors that are not live.
        NonFiniteLossError: the base, or the base perturbed by eps, gives no finite scores.
    """
    if model.adapter is not None:
        _prove_adapter_live(model)
        return
    feeds = _probe_feeds(model)
    if model.on_device is not None:
        _prove_on_device(model, weights, feeds)
        return
    path = model.directory / model.manifest.scoring.file
    _prove_in_place(model, weights, _Proven("the scoring graph", path, feeds, "log_probs", lambda: model.scoring, model.fresh_scoring))
    if generates:
        path, feeds = model.directory / model.generation_facts.file, _generation_feeds(model)
        graph = _Proven("the generation graph", path, feeds, "logits", lambda: model.generation, model.fresh_generation)
        _prove_in_place(model, weights, graph)


def _prove_in_place(model: EdgeModel, weights: MutableWeights, graph: _Proven) -> None:
    names = list(weights.passes.shapes)
    dead = disconnected(graph.path, names)
    if dead:
        raise _refusal(model, dead, f"nothing in {graph.shown} uses them")
    with _perturbed(weights):
        changed_at_load = graph.scores(graph.fresh())
    session = graph.use()
    dead = [name for name in names if name not in session.mutable]
    if dead:
        raise _refusal(model, dead, f"they are constants of {graph.shown}, not overridable initializers")
    base = graph.scores(session)
    with _perturbed(weights):
        changed_in_place = graph.scores(session)
    _refuse_non_finite(model, base, changed_at_load)
    if np.array_equal(changed_in_place, changed_at_load) and not np.array_equal(changed_in_place, base):
        return
    dead = [name for name in names if np.array_equal(_changed_alone(model, name, graph, session), base)]
    if not dead:  # all are seen, but one not everywhere it is used: the engine has copied it for some node
        fresh = {name: _changed_alone(model, name, graph, None) for name in names}
        dead = [name for name in names if not np.array_equal(_changed_alone(model, name, graph, session), fresh[name])]
    raise _refusal(model, dead or names, "the engine does not see their changes")


def _prove_on_device(model: EdgeModel, weights: MutableWeights, feeds: dict[str, Array]) -> None:
    """Weights on a device are plain inputs, which nothing can freeze: it is left to prove that kernels write where the graph reads.

    Of all tensors at once, not of each: they are bound by one rule, offsets into one buffer.
    """
    dead = disconnected(model.directory / model.manifest.scoring.file, list(weights.passes.shapes))
    if dead:
        raise _refusal(model, dead, "nothing in the scoring graph uses them")
    base = _scores(model.scoring, feeds)
    with _perturbed(weights):
        changed = _scores(model.scoring, feeds)
    _refuse_non_finite(model, base, changed)
    if np.array_equal(changed, base) or not np.array_equal(_scores(model.scoring, feeds), base):
        raise _refusal(model, list(weights.passes.shapes), "the engine does not see what is written to the device")


def _refuse_non_finite(model: EdgeModel, base: Array, changed: Array) -> None:
    for scores, where, advice in ((base, "theta", model.remedy), (changed, "theta + eps z", "try a smaller --eps")):
        if not np.isfinite(scores).all():
            raise NonFiniteLossError(f"the log-probabilities at {where} are NaN or infinite before the first step; {advice}")


def _prove_adapter_live(model: EdgeModel) -> None:
    adapter = model.manifest.adapter
    lora = adapter is not None and adapter.kind == "lora"
    probe = _LoraProbe(adapter.targets) if lora and adapter is not None else _PrefixProbe(model.weights[PREFIX])
    dead = disconnected(model.directory / model.manifest.scoring.file, probe.inputs)
    if dead:
        raise _refusal(model, dead, "nothing in the scoring graph uses them", len(probe.names))
    dead = []
    for first in range(0, len(probe.names), PROBE_COPIES - 2):
        chosen = range(first, min(first + PROBE_COPIES - 2, len(probe.names)))
        # the first and the last copy are alike: rows of one batch may differ by rounding
        scores = _scores(model.scoring, {**_probe_feeds(model, len(chosen) + 2), **probe.feeds(chosen)}).reshape(len(chosen) + 2, -1)
        if not np.isfinite(scores).all():
            raise NonFiniteLossError(f"the log-probabilities are NaN or infinite before the first step; {model.remedy}")
        rounding = np.abs(scores[-1] - scores[0]).max()
        changes = np.abs(scores[1:-1] - scores[0]).max(axis=1)
        dead += [probe.names[number] for number, change in zip(chosen, changes, strict=True) if change <= 4 * rounding]
    if dead:
        raise _refusal(model, dead, "their changes do not reach the scores", len(probe.names))


class _LoraProbe:
    """Rank-one adapters with one tensor perturbed a copy: A and B of every target."""

    def __init__(self, targets: list[LoraTarget]) -> None:
        self.lora = Lora(targets, rank=1, alpha=1)
        self.lora.a[...] = noise.uniforms(0, "probe A", self.lora.a.size) / 8
        self.lora.b[...] = noise.uniforms(0, "probe B", self.lora.b.size) / 8
        self.inputs = [name for target in targets for name in (target.a, target.b)]
        self.names = self.inputs

    def feeds(self, chosen: range) -> dict[str, Array]:
        """Copies: unchanged, each of `chosen` changed, unchanged."""
        copies, count = len(chosen) + 2, len(self.lora.targets)
        rows = {A_ROWS: np.zeros((copies, 1, count, 1), np.float32), B_ROWS: np.zeros((copies, 1, 1, count), np.float32)}
        for copy, number in enumerate(chosen, start=1):
            target, kind = divmod(number, 2)
            rows[B_ROWS if kind else A_ROWS][(copy, 0, 0, target) if kind else (copy, 0, target, 0)] = 2**-4
        # drawn, since a layer norm leaves nothing of what is alike in all features
        signs = {name: np.tile(_mixed_signs(name, sizes), (copies, 1)) for name, sizes in (
            (A_SIGNS, self.lora.layouts["lora_A"].rows), (B_SIGNS, self.lora.layouts["lora_B"].columns))}  # fmt: skip
        return {**self.lora.feeds(), **rows, **signs}


def _mixed_signs(name: str, sizes: Sequence[int]) -> Array:
    """Drawn signs of every target, none with one sign alone: logits of two classes that move together are the same scores."""
    signs: Array = noise.signs(PROBE, noise.tensor_id(name), sum(sizes)).copy()
    for part in np.split(signs, np.cumsum(sizes)[:-1]):
        if abs(int(part.sum())) == len(part):
            part[-1] *= -1
    return signs


class _PrefixProbe:
    """Prefixes with the keys or the values of one layer perturbed a copy."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.inputs = [name for layer in range(len(array)) for name in prefix_inputs(layer)]
        self.names = self.inputs

    def feeds(self, chosen: range) -> dict[str, Array]:
        """Copies: unchanged, each of `chosen` changed, unchanged."""
        feeds = {}
        for number, name in enumerate(self.names):
            copies = np.repeat(self.array[number // 2, number % 2][None], len(chosen) + 2, axis=0)
            if number in chosen:
                z = noise.draw(PROBE, name, copies[0].size).reshape(copies[0].shape)
                copies[1 + number - chosen.start] += np.float32(2**-4) * z
            feeds[name] = copies
        return feeds


@contextmanager
def _perturbed(weights: MutableWeights) -> Iterator[None]:
    """theta + eps z inside, theta again afterwards; z of signs for every element, whatever the run's sampler leaves out."""
    weights.passes.add(weights.tensors, {PROBE: {weights.eps: 1}}, Full())
    try:
        yield
    finally:
        weights.passes.add(weights.tensors, {PROBE: {weights.eps: -1}}, Full())


def _changed_alone(model: EdgeModel, name: str, graph: _Proven, session: Session | None) -> Array:
    """Scores with one tensor changed, by `session` or by one that is made after the change; the bytes are put back. The slow proof."""
    array = model.weights[name]
    original = array.copy()
    # noise, since a layer norm takes away what is added to all its inputs alike
    array += np.float32(2**-7) * noise.draw(PROBE, name, array.size).reshape(array.shape)
    try:
        return graph.scores(session or graph.fresh())
    finally:
        array[...] = original


def _scores(session: Session, feeds: dict[str, Array]) -> Array:
    return session.run(["log_probs"], feeds)[0]


def _probe_feeds(model: EdgeModel, rows: int = 1) -> dict[str, Array]:
    """A short row of spread-out tokens, a few targets at every position. Of a classifier every class is a target.

    Repeated, it is shorter and has targets at the last token alone: else the copies of 420 tensors would take half of the seconds before the first step, and their logits would be the peak of a run.
    """
    vocabulary, count = model.manifest.origin.vocab_size, PROBE_TOKENS if rows == 1 else COPY_TOKENS
    classes = len(model.manifest.classes)
    positions = np.arange(count, dtype=np.int64)
    tokens = ((positions + 1) * (vocabulary // (count + 1) or 1)) % vocabulary
    targets = (tokens * 7 + 3) % vocabulary
    hidden = np.arange(rows * count, dtype=np.int64).reshape(rows, count)[:, 0 if rows == 1 else count - 1 :].ravel()
    if classes:  # one row of logits a row of the batch
        targets, hidden = np.arange(classes, dtype=np.int64), np.arange(rows, dtype=np.int64)
    before = model.adapter.prefix_tokens if model.adapter is not None else 0
    feeds = {
        "input_ids": np.tile(tokens, (rows, 1)),
        "attention_mask": np.ones((rows, before + count), np.int64),
        "position_ids": np.tile(before + positions, (rows, 1)),
        "hidden_rows": hidden,
        "pair_rows": np.repeat(np.arange(len(hidden), dtype=np.int64), len(targets)),
        "pair_targets": np.tile(targets, len(hidden)),
    }
    return {name: feeds[name] for name in model.manifest.scoring.inputs}


def _generation_feeds(model: EdgeModel) -> dict[str, Array]:
    """The same short row, with nothing read before it and the logits of every position."""
    graph, feeds = model.generation_facts, _probe_feeds(model)
    past = {state.input: np.zeros((1, state.heads, 0, state.head_dim), np.float32) for state in graph.past}
    return {**{name: feeds[name] for name in graph.inputs}, **past}


def _refusal(model: EdgeModel, dead: list[str], why: str, total: int | None = None) -> DeadTensorError:
    shown = ", ".join(dead[:5]) + (f" and {len(dead) - 5} more" if len(dead) > 5 else "")
    return DeadTensorError(
        f"{model.directory}: {len(dead)} of {total or len(model.manifest.tunable)} tunable tensors would not be tuned, {why}: {shown}; export again, or leave them out with --tunable or --targets"
    )
