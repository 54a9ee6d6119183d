"""Whether a run can be believed: its checksums, its files, and its scalars derived again by forward passes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgezo.errors import DataError, RunError
from edgezo.runtime.corpus import sha256_data
from edgezo.runtime.data import where
from edgezo.runtime.dataset import read_dataset
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.objective import Objective
from edgezo.runtime.replay import check_base, last_step_told, take_head
from edgezo.runtime.run import DECISIVE, INIT, SUMMARY, Run, check_same, journal_header, read_run, read_summary, refuse_moved
from edgezo.runtime.scoring import Sequences
from edgezo.runtime.theta import Theta, mutable_weights, step_directions
from edgezo.storage import JOURNAL, sha256_file

LOSS_TOLERANCE = (
    1e-3  # nats; other processors and engine versions stay within 1e-4. Of an objective in steps a row that tips there is a difference
)


class CheckedFile(NamedTuple):
    """A file of a run: its setting ("data", "valid" or "init"), where it is looked for, and "as recorded", "changed" or "not there"."""

    setting: str
    path: str
    state: str

    @property
    def mend(self) -> str:
        """What to do about a file that is changed or not there."""
        return "restore it from a copy" if self.setting == "init" else f"say where that is: --{self.setting} PATH"


class Findings(NamedTuple):
    """What a check of a run found. `problems` is empty when all is well.

    files: those that the journal has hashes of. derived: scalars derived again. largest_loss_difference: over these, of (L+ + L-) / 2
    of (L+ - L-) / 2 and, where the journal has curvatures, of a quarter of L+ - 2 L + L-, in units of the objective.
    """

    steps: int
    evaluations: int
    torn_bytes: int
    journal_sha256: str
    files: list[CheckedFile]
    derived: int
    largest_loss_difference: float | None
    problems: list[str]


def check_run(
    directory: Path,
    model: EdgeModel | None = None,
    every: int | None = None,
    progress: Callable[[int], None] = lambda step: None,
    data: str | None = None,
    valid: str | None = None,
) -> Findings:
    """Check the checksums of a run's journal, that it has all its steps, and the hashes of its files; with `model` also its base, with `every` its scalars.

    Args:
        directory: run directory.
        model: the base, freshly opened; its weights are brought to the last step when `every` is given.
        every: derive the scalars of every so-manieth step again, by its forward passes at the replayed weights.
        progress: told the number of steps done.
        data: where its training rows are now, if not where the run has them.
        valid: where its validation rows are now.

    Raises:
        RunError: the journal cannot be read or was changed, the run is of another base, or was made without validation rows to look for.
        DataError: `data` or `valid` is not there; the data, needed for `every`, cannot be read.
    """
    run = read_run(directory)
    moved = {name: path for name, path in (("data", data), ("valid", valid)) if path is not None}
    for name, path in moved.items():
        if run.header.get(name) is None:
            raise RunError(f"{directory}: the run was made without --{name}; leave it out")
        if not _is_there(path):
            raise DataError(
                f"--{name} {path!r}: no such file or folder{'' if Path(path).is_absolute() else f' {where(path)}'}; give the place where it is now"
            )
    run = run._replace(config=run.config.model_copy(update=moved))
    if every is not None:
        refuse_moved(directory, run.config)
    paths = {"data": run.config.data, "valid": run.config.valid, "init": str(directory / INIT)}
    files = [
        CheckedFile(name, path, _state(path, recorded))
        for name, path in paths.items()
        if path is not None and (recorded := run.header.get(name))
    ]
    problems = [
        f"{Path(file.path).absolute()} is not the file the run was made with, {file.mend}" for file in files if file.state == "changed"
    ]
    ended, made = read_summary(directory).get("steps"), len(run.records)
    if isinstance(ended, int) and ended > made and not run.journal.undos:  # steps that were taken back may be behind it
        problems.append(
            f"{JOURNAL} ends after step {made} and {SUMMARY} tells of {ended} steps: its end is lost, restore it from a copy, or go on from step {made} with --resume"
        )
    derived, largest = 0, None
    if model is not None:
        check_base(run, model)
        if every is not None and all(file.state == "as recorded" for file in files):
            derived, largest = _derive_again(run, model, every, progress)
            if not largest <= LOSS_TOLERANCE:
                problems.append(f"losses derived again differ by {largest:.1e} from those recorded, allowed are {LOSS_TOLERANCE:.0e}")
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
    """Replay, and on the way run the forwards of every so-manieth step."""
    dataset = read_dataset(model, run.config)
    check_same(run, dataset.config, journal_header(model.manifest, dataset.config, run.start))
    dataset = dataset.with_offsets(run.journal.offsets)
    order, weights = dataset.order(run.order_version), mutable_weights(model, run.config, run.start)
    objective = Objective(Sequences(model), dataset.task, run.config)
    take_head(run, model, 0)  # the references of dpo are of the model that the run began with
    if objective.name == "dpo":
        dataset = dataset.with_references(objective.sequences)
    theta = Theta(model, run.config, weights, objective)
    derived, largest = 0, 0.0
    for step, record in enumerate(run.records):
        directions = step_directions(run.config, step)
        if step % every == 0:
            take_head(run, model, step)
            found = theta.measure(partial(dataset.batch, order), step, record.learning_rate)
            loss = float(np.mean([estimate.loss for estimate in found]))
            largest = max(largest, abs(loss - record.loss))
            for place, (estimate, recorded) in enumerate(zip(found, record.projected_grads, strict=True)):
                unit = weights.eps if place < len(directions) else weights.eps**2 / 4  # curvatures, behind the projected gradients
                largest = max(largest, abs(estimate.projected_grad - recorded) * unit)
            derived += 1
        with last_step_told(run, step + 1):
            theta.step(directions, record.projected_grads, record.learning_rate)
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
    headers = {f"same_{name}": first.header.get(name) == second.header.get(name) for name in ("base", "data", "valid", "tokenizer", "init")}
    decisive = all(one[name] == other[name] for name in DECISIVE) and _same_heads(first, second, equal)
    return {
        "steps": [len(first.records), len(second.records)],
        "equal_steps": equal,
        "equal_weights_up_to_step": equal if headers["same_base"] and headers["same_init"] and decisive else None,
        **headers,
        "settings": {name: [one[name], other[name]] for name in one if one[name] != other[name]},
        "best_step": [first.best_step, second.best_step],
        "best": [_best(first), _best(second)],
    }


def _same_heads(first: Run, second: Run, steps: int) -> bool:
    """Whether the rows of the head are the same up to a step."""
    heads = [{place: head for place, head in run.journal.heads.items() if place <= steps} for run in (first, second)]
    return heads[0].keys() == heads[1].keys() and all(heads[0][place].equals(heads[1][place]) for place in heads[0])


def _best(run: Run) -> dict[str, float | int] | None:
    evaluation = run.evaluations.get(run.best_step)
    return evaluation.as_dict() if evaluation is not None else None


def _is_there(path: str) -> bool:
    """A file, or a folder of texts; a pipe is read only once."""
    return path != "" and (Path(path).is_file() or Path(path).is_dir())  # "" would be the working directory


def _state(path: str, recorded: object) -> str:
    if not _is_there(path):
        return "not there"
    return "as recorded" if sha256_data(path) == recorded else "changed"
