"""Tuned weights as an edge model of their own: replayed from a journal, or averaged over several runs of one base."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgezo.errors import ConfigError, RunError
from edgezo.manifest import Manifest, StoredFile, Tuned
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.run import JOURNAL, StepChoice, base_id
from edgezo.storage import directory_in_the_making, refuse_existing, sha256_file


def write_replayed(directory: Path, run: Path, step: StepChoice, output: Path, threads: int | None = None) -> Manifest:
    """Write base + journal as an edge model.

    Args:
        directory: the edge model the run was tuned from.
        run: run directory.
        step: a number, "best" (by validation) or "last".
        output: directory to make; it must not exist.

    Raises:
        RunError: the run cannot be read, belongs to another base, or `output` exists or cannot be written.
    """
    refuse_existing(output, RunError, "choose another directory or remove it")
    model = EdgeModel(directory, threads=threads, run=run, step=step)
    return _write(
        model, output, [Tuned(base=base_id(model.manifest), journal=sha256_file(run / JOURNAL), step=model.step or 0, weight=1.0)]
    )


def write_averaged(
    directory: Path, runs: Sequence[Path], weights: Sequence[float], step: StepChoice, output: Path, threads: int | None = None
) -> Manifest:
    """Write theta = base + sum_i weights[i] * (theta_i - base) as an edge model, theta_i from run i.

    The sum is taken in float64 tensor by tensor and rounded to float32. With weights that add up to 1 it is the mean of the runs.

    Args:
        directory: the edge model that all runs were tuned from.
        runs: run directories.
        weights: one finite number a run.
        step: of every run: a number, "best" (by validation) or "last".
        output: directory to make; it must not exist.

    Raises:
        ConfigError: not one finite weight a run.
        RunError: a run cannot be read or belongs to another base, or `output` exists or cannot be written.
    """
    if len(weights) != len(runs) or not np.isfinite(weights).all():
        raise ConfigError(f"--weights: {len(weights)} numbers for {len(runs)} runs; give one finite number a run")
    refuse_existing(output, RunError, "choose another directory or remove it")
    model = EdgeModel(directory, threads=threads)
    sums = {name: array.astype(np.float64) for name, array in model.tunable.items()}
    tuned = []
    for run, weight in zip(runs, weights, strict=True):
        one = EdgeModel(directory, threads=threads, run=run, step=step)
        for name, array in one.tunable.items():
            sums[name] += weight * (array.astype(np.float64) - model.weights[name])
        tuned.append(Tuned(base=base_id(model.manifest), journal=sha256_file(run / JOURNAL), step=one.step or 0, weight=weight))
    for name, total in sums.items():
        model.weights[name][...] = total
    return _write(model, output, tuned)


def _write(model: EdgeModel, output: Path, tuned: list[Tuned]) -> Manifest:
    """The edge model at its present weights; every file but those of tunable weights is a copy."""
    changed = {tensor.file for tensor in model.manifest.tunable}
    try:
        with directory_in_the_making(output) as folder:
            files = dict(model.manifest.files)
            for name in files:
                if name in changed:
                    files[name] = _write_buffer(folder / name, model.buffers[name])
                else:
                    shutil.copyfile(model.directory / name, folder / name)
            manifest = model.manifest.model_copy(update={"files": files, "tuned": [*model.manifest.tuned, *tuned], "verification": None})
            manifest.write(folder)
    except OSError as error:
        raise RunError(
            f"{output}: cannot be written ({error.strerror or error}); nothing was kept, free space or choose another directory"
        ) from error
    return manifest


def _write_buffer(path: Path, buffer: "np.ndarray[tuple[int], np.dtype[np.uint8]]") -> StoredFile:
    with open(path, "wb") as file:
        file.write(buffer.data)
    return StoredFile(bytes=len(buffer), sha256=hashlib.sha256(buffer.data).hexdigest())
