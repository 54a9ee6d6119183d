"""Reading an edge model's manifest: what a reader refuses before any session is made."""

import json
import math
from itertools import pairwise
from pathlib import Path

from pydantic import ValidationError

from edgezo.adapters import HEAD_ROWS, HEAD_TOKENS, PREFIX, PROBE_A, LoraTarget
from edgezo.config import READING_SETTINGS, TuneConfig, describe
from edgezo.errors import EdgeModelError
from edgezo.manifest import ALIGNMENT, FORMAT, MANIFEST_BYTES_LIMIT, MANIFEST_NAME, READABLE, READING_VERSION, Manifest, StoredFile
from edgezo.storage import is_plain_name, is_run, sha256_file


def read_manifest(directory: Path) -> Manifest:
    """Read and check manifest.json; file contents are checked by `verify_file` or while they are loaded.

    Raises:
        EdgeModelError: missing, not JSON, of an unknown version, or contradicting itself.
    """
    path = directory / MANIFEST_NAME
    if directory.is_file():
        raise EdgeModelError(f"{directory}: a file, no edge model; give the folder that edgezo export MODEL -o FOLDER made")
    if not directory.is_dir():
        raise EdgeModelError(f"{directory}: no such directory; make an edge model with: edgezo export MODEL -o {directory}")
    if not path.is_file():
        if is_run(directory):
            raise EdgeModelError(
                f"{directory}: a run, no edge model; give the edge model that it was tuned from (eval, predict, generate, chat and rate take the run as --run {directory})"
            )
        raise EdgeModelError(f"{directory}: no {MANIFEST_NAME} in it; an edge model is made by: edgezo export MODEL -o DIR")
    if path.stat().st_size > MANIFEST_BYTES_LIMIT:
        raise EdgeModelError(f"{path}: larger than {MANIFEST_BYTES_LIMIT} bytes; this is no edge model manifest")
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EdgeModelError(f"{path}: not readable as JSON ({error}); export the model again") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise EdgeModelError(f"{path}: not an edge model manifest (format is not {FORMAT!r})")
    if raw.get("version") not in READABLE:
        raise EdgeModelError(
            f"{path}: manifest version {raw.get('version')!r}, this edgezo reads {', '.join(map(str, READABLE[:-1]))} and {READABLE[-1]}; export again or update edgezo"
        )
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise EdgeModelError(f"{path}: {where}: {first['msg']}; export the model again") from None
    _check(manifest, path)
    return manifest


def verify_file(directory: Path, name: str, stored: StoredFile, sha256: str | None = None) -> None:
    """Compare one file's size and, when `sha256` was computed while loading, that; else hash the file now."""
    path = directory / name
    verify_size(directory, name, stored)
    found = sha256_file(path) if sha256 is None else sha256
    if found != stored.sha256:
        raise EdgeModelError(
            f"{path}: SHA-256 {found[:12]}, manifest says {stored.sha256[:12]}; the file was changed, copy or export it again"
        )


def verify_size(directory: Path, name: str, stored: StoredFile) -> None:
    """Refuse a missing, linked or truncated file before anything is read from it."""
    path = directory / name
    if path.is_symlink() or not path.is_file():
        raise EdgeModelError(f"{path}: missing or not a plain file; copy or export the edge model again")
    found = path.stat().st_size
    if found != stored.bytes:
        raise EdgeModelError(f"{path}: {found} bytes, manifest says {stored.bytes}; copy or export the edge model again")


def _check(manifest: Manifest, path: Path) -> None:
    """The rules between fields that types cannot state."""

    def refuse(problem: str) -> None:
        raise EdgeModelError(f"{path}: {problem}; export the model again")

    for name in manifest.files:
        if not is_plain_name(name):
            refuse(f"file name {name!r} leaves the directory")
    referred = [manifest.scoring.file, manifest.tokenizer.file, *(t.file for t in manifest.tensors)]
    generation = manifest.generation.file if manifest.generation is not None else None
    referred += [name for name in (generation, manifest.tokenizer.chat_template, manifest.config) if name is not None]
    for name in referred:
        if not is_plain_name(name):
            refuse(f"file name {name!r} leaves the directory")
        if name not in manifest.files:
            refuse(f"file {name!r} is used but not listed under files")
    facts, vocabulary = manifest.tokenizer, manifest.origin.vocab_size
    ends = [("eos_token_ids", token) for token in facts.eos_token_ids]
    for kind, token in (
        ("pad_token_id", facts.pad_token_id),
        ("bos_token_id", facts.bos_token_id),
        ("mask_token_id", facts.mask_token_id),
        *ends,
    ):
        if token is not None and not 0 <= token < vocabulary:
            refuse(f"{kind} {token} is outside the vocabulary of {vocabulary}")
    seen: set[str] = set()
    spans: dict[str, list[tuple[int, int, str]]] = {}
    for tensor in manifest.tensors:
        if tensor.name in seen:
            refuse(f"tensor {tensor.name!r} is listed twice")
        seen.add(tensor.name)
        if any(extent <= 0 for extent in tensor.shape) or tensor.offset % ALIGNMENT:
            refuse(f"tensor {tensor.name!r} has shape {tensor.shape} at offset {tensor.offset}")
        if tensor.tunable and tensor.dtype != "float32":
            refuse(f"tensor {tensor.name!r} is tunable but {tensor.dtype}")
        if tensor.offset + tensor.nbytes > manifest.files[tensor.file].bytes:
            refuse(f"tensor {tensor.name!r} ends after the end of {tensor.file}")
        spans.setdefault(tensor.file, []).append((tensor.offset, tensor.offset + tensor.nbytes, tensor.name))
    for name, parts in spans.items():
        parts.sort()
        for (_, end, first), (start, _, second) in pairwise(parts):
            if start < end:
                refuse(f"tensors {first!r} and {second!r} overlap in {name}")
    if manifest.adapter is None and not manifest.tunable:
        refuse("no tensor is tunable")
    problem = _family_problem(manifest) or _head_problem(manifest) or _quantization_problem(manifest) or _adapter_problem(manifest)
    if problem:
        refuse(problem)
    if problem := _reading_problem(manifest):
        raise EdgeModelError(f"{path}: reading: {problem}; merge the runs again")


def _reading_problem(manifest: Manifest) -> str | None:
    if manifest.reading is None:
        return None
    if manifest.version < READING_VERSION:
        return f"version {manifest.version} has none"
    if unknown := [name for name in manifest.reading if name not in READING_SETTINGS]:
        return f"{unknown[0]!r} is no setting of it; these are {', '.join(READING_SETTINGS)}"
    try:
        TuneConfig.model_validate({**manifest.reading, "data": "rows"})
    except ValidationError as error:
        return describe(error)
    return None


def _family_problem(manifest: Manifest) -> str | None:
    family, classes = manifest.origin.family, manifest.classes
    if (family == "causal") != (manifest.generation is not None):
        return f"it is {family}, {'without' if family == 'causal' else 'with'} a generation graph"
    if (family == "masked") != (manifest.tokenizer.mask_token_id is not None):
        return f"it is {family}, {'without' if family == 'masked' else 'with'} a mask token"
    if family != "classifier" and manifest.pooling is not None:
        return f"it is {family}, with a pooling"
    if family != "classifier":
        return f"it is {family}, with classes" if classes else None
    if len(classes) < 2 or len(set(classes)) != len(classes) or not all(classes):
        return f"it is a classifier with the classes {classes}, which are not two or more of a name each"
    return None


def _head_problem(manifest: Manifest) -> str | None:
    stored = {tensor.name: tensor for tensor in manifest.tensors if tensor.name in {HEAD_TOKENS, HEAD_ROWS, PROBE_A}}
    targets = manifest.probes
    if len({target.module for target in targets}) != len(targets) or len({(t.in_features, t.out_features) for t in targets}) > 1:
        return "the layers of its probe are named twice, or differ in size"
    if misfit := next((target.module for target in targets if not _fits(target, manifest)), None):
        return f"layer {misfit!r} of its probe does not fit a stored weight"
    if not stored:
        return None
    tokens, rows, probe = (stored.get(name) for name in (HEAD_TOKENS, HEAD_ROWS, PROBE_A))
    if probe is not None and (
        probe.dtype != "float32" or len(probe.shape) != 3 or not targets or probe.shape[:2] != [len(targets), targets[0].in_features]
    ):
        return f"its probe has shape {probe.shape}, for {len(targets)} layers"
    fits = tokens is not None and rows is not None and (tokens.dtype, rows.dtype) == ("int64", "float32")
    if not fits or tokens is None or rows is None or len(rows.shape) != 2 or tokens.shape != rows.shape[1:]:
        return f"its rows of the head ({', '.join(sorted(stored))}) do not fit each other"
    return None


def _quantization_problem(manifest: Manifest) -> str | None:
    tensors = {tensor.name: tensor for tensor in manifest.tensors}
    for tensor in manifest.tensors:
        stored = tensor.quantized
        if stored is None:
            continue
        scales = tensors.get(stored.scales)
        fits = (
            tensor.dtype == "uint8" and not tensor.tunable and stored.block * stored.bits % 8 == 0 and tensor.shape == stored.packed_shape
        )
        if not fits or scales is None or scales.dtype != "float32" or scales.size != math.prod(tensor.shape[:2]):
            return f"tensor {tensor.name!r} says it is quantized, but its shape, type or scales do not fit"
    return None


def _fits(target: LoraTarget, manifest: Manifest) -> bool:
    """Whether a linear layer has a stored weight of its shape."""
    tensor = next((tensor for tensor in manifest.tensors if tensor.name == f"{target.module}.weight"), None)
    shape = [target.out_features, target.in_features] if target.out_first else [target.in_features, target.out_features]
    return tensor is not None and shape == (tensor.quantized.shape if tensor.quantized else tensor.shape)


def _adapter_problem(manifest: Manifest) -> str | None:
    adapter, tensors = manifest.adapter, {tensor.name: tensor for tensor in manifest.tensors}
    if adapter is not None and adapter.kind == "lora":
        if manifest.tunable or not adapter.targets or len({target.module for target in adapter.targets}) != len(adapter.targets):
            return "its LoRA has no targets, one twice, or a tunable base"
        if misfit := next((target.module for target in adapter.targets if not _fits(target, manifest)), None):
            return f"LoRA target {misfit!r} does not fit a stored weight"
        return None
    prefix = tensors.get(PREFIX)
    if adapter is None:
        return f"tensor {PREFIX!r} is stored, but no prefix is described" if prefix is not None else None
    past = manifest.generation.past if manifest.generation is not None else []
    heads = {(state.heads, state.head_dim) for state in past}
    if prefix is None or manifest.tunable != [prefix] or len(heads) != 1 or len(prefix.shape) != 5:
        return "it is prepared for a prefix, but none that is tunable and alone is stored"
    ((count, head_dim),) = heads
    if prefix.shape != [len(past) // 2, 2, count, adapter.tokens, head_dim] or adapter.tokens >= manifest.origin.context_length:
        return f"its prefix has shape {prefix.shape}, which does not fit the graphs"
    return None
