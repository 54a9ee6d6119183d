"""The proof, at the start of a run, that the engine sees a change of every tunable tensor.

Many tensors are proven with few runs. All of them are perturbed at once; a session made *afterwards* has read the changed bytes whatever
it folds, packs or copies, so its scores are what a live session must give. Then the session that will be used is made from the
unchanged bytes, the same change is written under it, and its scores must be equal to the last bit: a tensor frozen in it would
keep its old value and break the equality. The cost is one more session and three short forwards instead of one forward a tensor.
What the proof cannot tell is a tensor whose changes reach the scores multiplied by nothing but zero: both sessions agree on it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from edgezo.errors import DeadTensorError, NonFiniteLossError
from edgezo.runtime import noise
from edgezo.runtime.graph_file import disconnected
from edgezo.runtime.model import Array, EdgeModel
from edgezo.runtime.noise import Direction
from edgezo.runtime.session import Session
from edgezo.runtime.weights import MutableWeights

PROBE = Direction(seed=0, step=(1 << 64) - 1)  # no run has this step
PROBE_TOKENS = 8  # more than one, or attention over a single key would hide queries and keys


def prove_live(model: EdgeModel, weights: MutableWeights) -> None:
    """Refuse the model unless every tunable tensor is live in its scoring session. The weights are afterwards as before.

    Raises:
        DeadTensorError: names the tensors that are not live.
        NonFiniteLossError: the base, or the base perturbed by eps, gives no finite scores.
    """
    names = list(model.tunable)
    path = model.directory / model.manifest.scoring.file
    dead = disconnected(path, names)
    if dead:
        raise _refusal(model, dead, "nothing in the scoring graph uses them")
    feeds = _probe_feeds(model)
    with _perturbed(weights):
        changed_at_load = _scores(model.fresh_scoring(), feeds)
    session = model.scoring
    dead = [name for name in names if name not in session.mutable]
    if dead:
        raise _refusal(model, dead, "they are constants of the scoring graph, not overridable initializers")
    base = _scores(session, feeds)
    with _perturbed(weights):
        changed_in_place = _scores(session, feeds)
    for scores, where, advice in ((base, "theta", "export the model again"), (changed_at_load, "theta + eps z", "try a smaller --eps")):
        if not np.isfinite(scores).all():
            raise NonFiniteLossError(f"the log-probabilities at {where} are NaN or infinite before the first step; {advice}")
    if np.array_equal(changed_in_place, changed_at_load) and not np.array_equal(changed_in_place, base):
        return
    dead = [name for name in names if np.array_equal(_changed_alone(model, name, feeds, session), base)]
    if not dead:  # all are seen, but one not everywhere it is used: the engine has copied it for some node
        fresh = {name: _changed_alone(model, name, feeds, None) for name in names}
        dead = [name for name in names if not np.array_equal(_changed_alone(model, name, feeds, session), fresh[name])]
    raise _refusal(model, dead or names, "the engine does not see their changes")


@contextmanager
def _perturbed(weights: MutableWeights) -> Iterator[None]:
    """theta + eps z inside, theta again afterwards."""
    weights.add(PROBE, weights.eps)
    weights.flush()
    try:
        yield
    finally:
        weights.add(PROBE, weights.eps, -1)
        weights.flush()


def _changed_alone(model: EdgeModel, name: str, feeds: dict[str, Array], session: Session | None) -> Array:
    """Scores with one tensor changed, by `session` or by one that is made after the change; the bytes are put back. The slow proof."""
    array = model.weights[name]
    original = array.copy()
    # noise, since a layer norm takes away what is added to all its inputs alike
    array += np.float32(2**-7) * noise.draw(PROBE, name, array.size).reshape(array.shape)
    try:
        return _scores(session or model.fresh_scoring(), feeds)
    finally:
        array[...] = original


def _scores(session: Session, feeds: dict[str, Array]) -> Array:
    return session.run(["log_probs"], feeds)[0]


def _probe_feeds(model: EdgeModel) -> dict[str, Array]:
    """One short row of spread-out tokens; a few targets at every position."""
    vocabulary = model.manifest.origin.vocab_size
    positions = np.arange(PROBE_TOKENS, dtype=np.int64)
    tokens = ((positions + 1) * (vocabulary // (PROBE_TOKENS + 1) or 1)) % vocabulary
    targets = np.tile((tokens * 7 + 3) % vocabulary, PROBE_TOKENS)
    feeds = {
        "input_ids": tokens[None],
        "attention_mask": np.ones((1, PROBE_TOKENS), np.int64),
        "position_ids": positions[None],
        "hidden_rows": positions,
        "pair_rows": np.repeat(positions, PROBE_TOKENS),
        "pair_targets": targets,
    }
    return {name: feeds[name] for name in model.manifest.scoring.inputs}


def _refusal(model: EdgeModel, dead: list[str], why: str) -> DeadTensorError:
    shown = ", ".join(dead[:5]) + (f" and {len(dead) - 5} more" if len(dead) > 5 else "")
    return DeadTensorError(
        f"{model.directory}: {len(dead)} of {len(model.tunable)} tunable tensors would not be tuned, {why}: {shown}; export again, or leave them out with --tunable"
    )
