"""Tuned weights for elsewhere: an edge model of their own, a Hugging Face folder, a PEFT folder, an .onnx_adapter file; of one run or averaged."""

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError

from edgezo.adapters import HEAD_ROWS, HEAD_TOKENS, PROBE_A, A, B
from edgezo.config import READING_SETTINGS, task_settings_of
from edgezo.errors import AdapterError, ConfigError, RunError, first_line
from edgezo.manifest import ALIGNMENT, READING_VERSION, Manifest, StoredFile, Tensor, Tuned
from edgezo.manifest_reader import read_manifest
from edgezo.runtime.head_rows import HeadRows, summed
from edgezo.runtime.hugging_face import lora_deltas, write_hugging_face
from edgezo.runtime.lora import Lora
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.onnx_adapter import ONNX_SUFFIX, write_onnx_adapter
from edgezo.runtime.peft_folder import write_peft
from edgezo.runtime.run import StepChoice, base_id, read_run
from edgezo.storage import JOURNAL, directory_in_the_making, refuse_existing, sha256_file

HEAD_FILE = "head.bin"
Format = Literal["edge", "hf", "peft", "onnx-adapter"]


def write_tuned(
    directory: Path,
    runs: Sequence[Path],
    shares: Sequence[float],
    step: StepChoice,
    output: Path,
    to: Format = "edge",
    threads: int | None = None,
) -> list[Tuned]:
    """Write base + sum_i shares[i] * (tuned_i - base), tuned_i from run i; with shares that add up to 1 it is the mean of the runs.

    Tensors tuned in place and prefixes are summed in float64 and rounded to float32. LoRA matrices are joined along the rank, which is
    the sum of their products exactly.

    Args:
        directory: the edge model that all runs were tuned from.
        runs: run directories.
        shares: one finite number a run.
        step: of every run: a number, "best" (by validation) or "last".
        output: what to make; it must not exist.
        to: "edge": an edge model with the change in its weights. "hf": a Hugging Face folder, float32. "peft": a folder that PEFT
            loads. "onnx-adapter": a file that onnxruntime loads beside the edge model's graphs.

    Returns:
        What was merged, run by run.

    Raises:
        ConfigError: not one finite share a run.
        AdapterError: the format cannot hold what was tuned.
        RunError: a run cannot be read or belongs to another base, or `output` exists or cannot be written.
    """
    if len(shares) != len(runs) or not np.isfinite(shares).all():
        raise ConfigError(f"--weights: {len(shares)} numbers for {len(runs)} runs; give one finite number a run")
    refuse_existing(output, RunError, "choose another place or remove it")
    if to == "onnx-adapter" and output.suffix != ONNX_SUFFIX:
        raise ConfigError(f"-o {output}: a file that ends in {ONNX_SUFFIX} is written; name it so")
    _refuse_format(directory, read_manifest(directory), to)
    model, tuned = _average(directory, runs, shares, step, threads)
    readings = [task_settings_of(read_run(run).config, READING_SETTINGS) for run in runs]
    reading = readings[0] if all(other == readings[0] for other in readings) else None
    try:
        if to == "onnx-adapter":
            output.parent.mkdir(parents=True, exist_ok=True)
            assert model.adapter is not None
            write_onnx_adapter(model.adapter, model.manifest, output, model.head)
        else:
            with directory_in_the_making(output) as folder:
                if to == "edge":
                    _write_edge(model, folder, tuned, reading)
                elif to == "hf":
                    write_hugging_face(model, folder)
                else:
                    assert model.adapter is not None
                    write_peft(model.adapter, model.manifest, folder, model.head)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{output}: cannot be written ({getattr(error, 'strerror', None) or first_line(error)}); nothing was kept, free space or choose another place"
        ) from error
    return tuned


def _refuse_format(directory: Path, manifest: Manifest, to: Format) -> None:
    """What a format cannot hold, told before the replay."""
    kind = manifest.adapter.kind if manifest.adapter is not None else None
    if to in {"peft", "onnx-adapter"} and kind is None:
        raise AdapterError(
            f"{directory}: its runs tune the weights of the base, not an adapter, so there is none to write; use --format hf or edge"
        )
    if to == "edge" and kind == "lora" and manifest.weights != "fp32":
        raise AdapterError(
            f"{directory}: its weights are {manifest.weights}, whose steps would swallow the change; use --format peft, onnx-adapter or hf"
        )


def _average(
    directory: Path, runs: Sequence[Path], shares: Sequence[float], step: StepChoice, threads: int | None
) -> tuple[EdgeModel, list[Tuned]]:
    if len(runs) == 1 and shares[0] == 1:
        model = EdgeModel(directory, threads=threads, run=runs[0], step=step)
        return model, [_tuned(model, runs[0], 1.0)]
    model = EdgeModel(directory, threads=threads)
    sums = {name: array.astype(np.float64) for name, array in model.weights.items()}
    loras, heads, tuned = [], [model.head], []
    one = EdgeModel(directory, threads=threads)
    for run, share in zip(runs, shares, strict=True):
        one.use(run=run, step=step)
        for name, array in one.weights.items():
            sums[name] += share * (array.astype(np.float64) - model.weights[name])
        if isinstance(one.adapter, Lora):
            loras.append(one.adapter)
        heads.append(one.head)
        tuned.append(_tuned(one, run, share))
    for name, total in sums.items():
        model.weights[name][...] = total
    if loras:
        model.adapter = _joined(loras, shares)
    model.head = summed(heads, [1 - math.fsum(shares), *shares])
    return model, tuned


def _joined(loras: Sequence[Lora], shares: Sequence[float]) -> Lora:
    """One LoRA of the summed rank whose product is the sum of share * alpha/rank * B A."""
    rank = sum(lora.rank for lora in loras)
    joined = Lora(loras[0].targets, rank, rank)
    for place, (a, b) in enumerate(zip(joined.matrices(A), joined.matrices(B), strict=True)):
        a[...] = np.concatenate([lora.matrices(A)[place] for lora in loras], axis=1)
        b[...] = np.concatenate(
            [np.float32(share * lora.scaling) * lora.matrices(B)[place] for lora, share in zip(loras, shares, strict=True)]
        )
    return joined


def _tuned(model: EdgeModel, run: Path, share: float) -> Tuned:
    return Tuned(base=base_id(model.manifest), journal=sha256_file(run / JOURNAL), step=model.step or 0, weight=share)


def _write_edge(model: EdgeModel, folder: Path, tuned: list[Tuned], reading: dict[str, Any] | None) -> None:
    """The edge model at its present weights, an adapter of LoRA merged into them; its branch points stay."""
    manifest = model.manifest
    deltas = lora_deltas(model.adapter) if isinstance(model.adapter, Lora) else {}
    files = dict(manifest.files)
    for name in files:
        if name in model.buffers:
            (folder / name).write_bytes(model.buffers[name].data)
        else:
            shutil.copyfile(model.directory / name, folder / name)
    for tensor in manifest.tensors:
        if tensor.name in deltas:
            weight = np.memmap(folder / tensor.file, "<f4", "r+", offset=tensor.offset, shape=tuple(tensor.shape))
            weight += deltas[tensor.name]()
            weight.flush()
    tensors = manifest.tensors
    if len(model.head.tokens):
        tensors = [*(tensor for tensor in tensors if tensor.file != HEAD_FILE), *_write_head(model.head, folder)]
    changed = {tensor.file for tensor in tensors if tensor.tunable or tensor.name in deltas or tensor.file == HEAD_FILE}
    for name in changed:
        files[name] = StoredFile(bytes=(folder / name).stat().st_size, sha256=sha256_file(folder / name))
    everything = [*manifest.tuned, *tuned]
    identity = hashlib.sha256(json.dumps([manifest.origin.weights_sha256, *(entry.model_dump() for entry in everything)]).encode())
    origin = manifest.origin.model_copy(update={"weights_sha256": identity.hexdigest()})
    known = {"reading": reading} if manifest.version >= READING_VERSION else {}  # the version also says what the graphs have
    facts = {"files": files, "tensors": tensors, "tuned": everything, "verification": None, "origin": origin, **known}
    manifest.model_copy(update=facts).write(folder)


def _write_head(head: HeadRows, folder: Path) -> list[Tensor]:
    """The rows of the head, and a probe, as a file of the edge model, which the runtime feeds to the graphs."""
    tensors, parts = [], [(HEAD_TOKENS, head.tokens.astype("<i8")), (HEAD_ROWS, np.ascontiguousarray(head.rows, "<f4"))]
    if head.probe.size:
        parts.append((PROBE_A, np.ascontiguousarray(head.probe, "<f4")))
    with open(folder / HEAD_FILE, "wb") as file:
        for name, array in parts:
            file.write(bytes(-file.tell() % ALIGNMENT))
            dtype: Literal["int64", "float32"] = "int64" if name == HEAD_TOKENS else "float32"
            tensors.append(
                Tensor(name=name, shape=list(array.shape), dtype=dtype, file=HEAD_FILE, offset=file.tell(), tunable=False, kind="head")
            )
            file.write(array.tobytes())
    return tensors
