"""Whether a run can be believed: its checksums, its files, and its scalars derived again by forward passes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from edgezo.runtime.dataset import read_dataset
from edgezo.runtime.estimator import two_sided
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.noise import Direction
from edgezo.runtime.objective import batch_loss
from edgezo.runtime.optimizer import sgd_step
from edgezo.runtime.run import JOURNAL, Run, check_base, check_same, journal_header, mutable_weights, read_run
from edgezo.runtime.scoring import Sequences
from edgezo.storage import sha256_file

LOSS_TOLERANCE = 1e-3  # nats; other processors and engine versions stay within 1e-4


class Findings(NamedTuple):
    """What a check of a run found. `problems` is empty when all is well.

    files: data file to "as recorded", "changed" or "not there". derived: scalars derived again. largest_loss_difference: over these, of
    L(theta + eps z) and L(theta - eps z), in nats.
    """

    steps: int
    evaluations: int
    torn_bytes: int
    journal_sha256: str
    files: dict[str, str]
    derived: int
    largest_loss_difference: float | None
    problems: list[str]


def check_run(
    directory: Path,
    model: EdgeModel | None = None,
    every: int | None = None,
    progress: Callable[[int], None] = lambda step: None,
) -> Findings:
    """Check the checksums of a run's journal and the hashes of its files; with `model` also its base, with `every` its scalars.

    Args:
        directory: run directory.
        model: the base, freshly opened; its weights are brought to the last step when `every` is given.
        every: derive the scalars of every so-manieth step again, by its two forward passes at the replayed weights.
        progress: told the number of steps done.

    Raises:
        RunError: the journal cannot be read or was changed, or the run is of another base.
        DataError: the data, needed for `every`, cannot be read.
    """
    run = read_run(directory)
    files = {path: _state(path, run.header.get(name)) for name, path in (("data", run.config.data), ("valid", run.config.valid)) if path}
    problems = [f"{path} is not the file the run was made with" for path, state in files.items() if state == "changed"]
    derived, largest = 0, None
    if model is not None:
        check_base(run, model)
        if every is not None:
            derived, largest = _derive_again(run, model, every, progress)
            if not largest <= LOSS_TOLERANCE:
                problems.append(f"losses derived again differ by {largest:.1e} nats from those recorded, allowed are {LOSS_TOLERANCE:.0e}")
    return Findings(
        len(run.records),
        len(run.evaluations),
        run.journal.torn_bytes,
        sha256_file(directory / JOURNAL),
        files,
        derived,
        largest,
        problems,
    )


def _derive_again(run: Run, model: EdgeModel, every: int, progress: Callable[[int], None]) -> tuple[int, float]:
    """Replay, and on the way run the two forwards of every so-manieth step."""
    dataset = read_dataset(model, run.config)
    check_same(run, dataset.config, journal_header(model.manifest, dataset.config))
    order, sequences, weights = dataset.order(), Sequences(model), mutable_weights(model, run.config)
    derived, largest = 0, 0.0
    for step, record in enumerate(run.records):
        direction = Direction(run.config.seed, step)
        if step % every == 0:
            batch = dataset.batch(order, step)
            found = two_sided(weights, lambda batch=batch: batch_loss(sequences, batch), direction, weights.eps)  # type: ignore[misc]
            half = record.projected_grad * weights.eps
            for own, recorded in ((found.loss_plus, record.loss + half), (found.loss_minus, record.loss - half)):
                largest = max(largest, abs(own - recorded))
            derived += 1
        sgd_step(weights, direction, record.projected_grad, record.learning_rate, run.config.weight_decay)
        progress(step + 1)
    weights.flush()
    return derived, largest


def compare_runs(first: Run, second: Run) -> dict[str, Any]:
    """What two runs have in common, as names and values.

    `equal_steps` counts the records from the start that are the same; when both have the same base, noise and seed, the weights up to
    there are the same to the last bit.
    """
    one, other = first.config.model_dump(), second.config.model_dump()
    equal = 0
    for left, right in zip(first.records, second.records, strict=False):
        if left != right:
            break
        equal += 1
    headers = {f"same_{name}": first.header.get(name) == second.header.get(name) for name in ("base", "data", "valid", "tokenizer")}
    decisive = all(one[name] == other[name] for name in ("seed", "eps", "noise", "weight_decay"))
    return {
        "steps": [len(first.records), len(second.records)],
        "equal_steps": equal,
        "equal_weights_up_to_step": equal if headers["same_base"] and decisive else None,
        **headers,
        "settings": {name: [one[name], other[name]] for name in one if one[name] != other[name]},
        "best_step": [first.best_step, second.best_step],
        "best": [_best(first), _best(second)],
    }


def _best(run: Run) -> dict[str, float | int] | None:
    evaluation = run.evaluations.get(run.best_step)
    return evaluation.as_dict() if evaluation is not None else None


def _state(path: str, recorded: object) -> str:
    if not Path(path).is_file():
        return "not there"
    return "as recorded" if sha256_file(Path(path)) == recorded else "changed"
