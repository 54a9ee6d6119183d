"""Weight files of an edge model, in memory: hashed while they are read, and seen as arrays."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgezo.adapters import HEAD_ROWS, HEAD_TOKENS, PROBE_A
from edgezo.errors import EdgeModelError
from edgezo.manifest import Manifest, StoredFile, Tensor
from edgezo.manifest_reader import verify_file
from edgezo.runtime.attention_probe import NO_PROBE
from edgezo.runtime.head_rows import NO_ROWS, HeadRows
from edgezo.runtime.machine import available_bytes
from edgezo.storage import CHUNK_BYTES


def refuse_too_large(directory: Path, manifest: Manifest) -> None:
    """Refuse weights larger than the free memory: a system that promises more than it has would end the process without a word.

    Args:
        directory: the edge model, for the message.
        manifest: of it.

    Raises:
        EdgeModelError: the weights are larger than what is free; says what would fit.
    """
    needed = sum(manifest.files[name].bytes for name in {tensor.file for tensor in manifest.tensors})
    needed += sum(tensor.nbytes for tensor in manifest.tensors if tensor.dtype == "float16")  # the CPU multiplies in float32
    free = available_bytes()
    if free is None or needed <= free:
        return
    smaller = {"fp32": {"int8": 1 / 4, "int4": 1 / 8}, "fp16": {"int8": 1 / 4, "int4": 1 / 8}, "int8": {"int4": 1 / 2}}.get(
        manifest.weights, {}
    )
    fitting = next((name for name, share in smaller.items() if share * needed * (1 + 1 / 8) < free), None)
    advice = f"export it with --adapter lora --weights {fitting}" if fitting else "take a smaller model"
    raise EdgeModelError(
        f"{directory}: its weights take {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; end other programs, or {advice}"
    )


def load_file(directory: Path, name: str, stored: StoredFile, into: npt.NDArray[np.uint8] | None = None) -> npt.NDArray[np.uint8]:
    """Read a weight file into memory, that of `into` when given, hashing the very bytes that are used."""
    path = directory / name
    try:
        buffer = np.empty(stored.bytes, np.uint8) if into is None else into
    except MemoryError:
        raise EdgeModelError(f"{path}: {stored.bytes / 1e9:.1f} GB of weights do not fit into memory; export a smaller model") from None
    digest = hashlib.sha256()
    target = buffer.data
    # hashed while the next part is read: 0.31 instead of 0.47 s for 538 MB
    with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(1) as hashing:
        position = 0
        while position < stored.bytes:
            count = file.readinto(target[position : position + CHUNK_BYTES])
            if not count:
                raise EdgeModelError(f"{path}: ends at {position} of {stored.bytes} bytes; copy or export the edge model again")
            hashing.submit(digest.update, target[position : position + count])
            position += count
    verify_file(directory, name, stored, digest.hexdigest())
    return buffer


def view_tensor(buffer: npt.NDArray[np.uint8], tensor: Tensor) -> npt.NDArray[np.float32]:
    """A float32 tensor of a weight file in memory, as stored."""
    stored = buffer[tensor.offset : tensor.offset + tensor.nbytes]
    array: npt.NDArray[np.float32] = stored.view("<f4").reshape(tensor.shape)
    return array


def read_head(directory: Path, manifest: Manifest) -> HeadRows:
    """The rows of the head that were merged into an edge model.

    Raises:
        EdgeModelError: they are not finite, or of tokens that it has not.
    """
    stored = {tensor.name: tensor for tensor in manifest.tensors if tensor.name in {HEAD_TOKENS, HEAD_ROWS, PROBE_A}}
    if not stored:
        return NO_ROWS

    def read(name: str) -> npt.NDArray[Any]:
        tensor = stored[name]
        dtype = np.dtype(tensor.dtype).newbyteorder("<")
        return np.fromfile(directory / tensor.file, dtype, tensor.size, offset=tensor.offset).reshape(tensor.shape)

    tokens, rows = read(HEAD_TOKENS), read(HEAD_ROWS)
    probe = read(PROBE_A) if PROBE_A in stored else NO_PROBE
    size = len(manifest.classes) or manifest.origin.vocab_size
    known = len(np.unique(tokens)) == len(tokens) and tokens.min() >= 0 and tokens.max() < size
    if not (known and np.isfinite(rows).all() and np.isfinite(probe).all()):
        raise EdgeModelError(
            f"{directory / stored[HEAD_ROWS].file}: rows of the head of tokens that the model has not, twice, or not finite; copy or merge the edge model again"
        )
    return HeadRows(tokens, rows, probe)
