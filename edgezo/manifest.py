"""The contract between the halves: what an edge model directory holds, and how a reader refuses a bad one."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, ValidationError

from edgezo.adapters import PREFIX, Adapter, Record
from edgezo.errors import EdgeModelError
from edgezo.quantization import Precision, Quantized
from edgezo.storage import is_plain_name, sha256_file, write_atomically

FORMAT: Final = "edgezo-edge-model"
VERSION: Final = 4
# 2 added adapter, weights, quantized tensors, config; 3 families and classes; 4 pooling, head; what older ones have means the same
READABLE = (1, 2, 3, 4)
MANIFEST_NAME = "manifest.json"
MANIFEST_BYTES_LIMIT = 64 << 20
ALIGNMENT = 4096  # bytes; every tensor starts on a page, so that any system can map it
ITEM_BYTES = {"float32": 4, "int64": 8, "bool": 1, "uint8": 1}

Pooling = Literal["mean", "cls"]
Family = Literal["causal", "masked", "classifier"]
FAMILY_WORDS: dict[Family, str] = {"causal": "a causal language model", "masked": "a masked language model", "classifier": "a classifier"}


class Origin(Record):
    """Where the model came from and what it is. `weights_sha256` is over its float32 weights, before any quantisation."""

    id: str
    weights_sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    revision: str | None = None
    license: str | None = None
    model_type: str
    family: Family = "causal"
    context_length: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)


class TokenizerFacts(Record):
    """Special tokens and the chat template."""

    file: str
    bos_token_id: int | None = None
    eos_token_ids: list[int] = Field(default_factory=list)
    pad_token_id: int = 0
    mask_token_id: int | None = None
    special_tokens: dict[str, str] = Field(default_factory=dict)
    chat_template: str | None = None


class Tensor(Record):
    """One stored weight. `name` is the Hugging Face name and the name in both graphs; `shape` is that of the stored array."""

    name: str = Field(min_length=1)
    shape: list[int]
    dtype: Literal["float32", "int64", "bool", "uint8"]
    file: str
    offset: int = Field(ge=0)
    tunable: bool
    transposed: bool = False
    layer: int | None = None
    kind: str
    tied_to: list[str] = Field(default_factory=list)
    quantized: Quantized | None = None

    @property
    def parameters(self) -> int:
        """Number of weights it stands for."""
        return math.prod(self.quantized.shape) if self.quantized else self.size

    @property
    def is_quantized(self) -> bool:
        """Whether integers are stored."""
        return self.quantized is not None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.size * ITEM_BYTES[self.dtype]


class PastState(Record):
    """One KV-cache tensor of the generation graph: [batch, heads, past, head_dim]."""

    input: str
    output: str
    heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)


class Graph(Record):
    """One ONNX graph and the inputs to feed, weights left out."""

    file: str
    inputs: list[str]
    outputs: list[str]
    past: list[PastState] = Field(default_factory=list)


class Verification(Record):
    """What the check at the end of the export measured against the source model.

    greedy_tokens_equal: None where there is no generation graph.
    quantization_loss_change: nats a token of the probes that quantising the weights cost; None for fp32.
    """

    largest_log_prob_difference: float
    greedy_tokens_equal: int | None = None
    onnxruntime: str
    quantization_loss_change: float | None = None


class Tuned(Record):
    """A run whose changes are in the weights: identity of its base, SHA-256 of its journal, the step, and its share in an average."""

    base: str
    journal: str = Field(pattern="^[0-9a-f]{64}$")
    step: int = Field(ge=0)
    weight: float


class StoredFile(Record):
    """Size and SHA-256 of one file."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(Record):
    """manifest.json of an edge model. See docs/edge-model.md.

    new_weights: those of a head that was made at export. pooling: what that head, one linear layer, reads of the last token states; None for
    the architecture's own head. head: weight of the vocabulary projection.
    """

    format: Literal["edgezo-edge-model"] = FORMAT
    version: Literal[1, 2, 3, 4] = VERSION
    edgezo: str
    origin: Origin
    tokenizer: TokenizerFacts
    scoring: Graph
    generation: Graph | None = None
    tensors: list[Tensor]
    weights: Precision = "fp32"
    adapter: Adapter | None = None
    config: str | None = None
    classes: list[str] = Field(default_factory=list)
    new_weights: list[str] = Field(default_factory=list)
    pooling: Pooling | None = None
    head: str | None = None
    verification: Verification | None = None
    tuned: list[Tuned] = Field(default_factory=list)
    files: dict[str, StoredFile]

    @property
    def tunable(self) -> list[Tensor]:
        """The tensors tuning may change, in their order in the file."""
        return [tensor for tensor in self.tensors if tensor.tunable]

    @property
    def tunable_size(self) -> int:
        """Number of tunable parameters."""
        return sum(tensor.size for tensor in self.tunable)

    def write(self, directory: Path) -> None:
        """Write manifest.json whole or not at all."""
        write_atomically(directory / MANIFEST_NAME, (self.model_dump_json(indent=1) + "\n").encode())


def read_manifest(directory: Path) -> Manifest:
    """Read and check manifest.json; file contents are checked by `verify_file` or while they are loaded.

    Raises:
        EdgeModelError: missing, not JSON, of an unknown version, or contradicting itself.
    """
    path = directory / MANIFEST_NAME
    if not directory.is_dir():
        raise EdgeModelError(f"{directory}: no such directory; make an edge model with: edgezo export MODEL -o {directory}")
    if not path.is_file():
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
    problem = _family_problem(manifest) or _quantization_problem(manifest) or _adapter_problem(manifest)
    if problem:
        refuse(problem)


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


def _adapter_problem(manifest: Manifest) -> str | None:
    adapter, tensors = manifest.adapter, {tensor.name: tensor for tensor in manifest.tensors}
    if adapter is not None and adapter.kind == "lora":
        if manifest.tunable or not adapter.targets or len({target.module for target in adapter.targets}) != len(adapter.targets):
            return "its LoRA has no targets, one twice, or a tunable base"
        for target in adapter.targets:
            tensor = tensors.get(f"{target.module}.weight")
            shape = [target.out_features, target.in_features] if target.out_first else [target.in_features, target.out_features]
            if tensor is None or shape != (tensor.quantized.shape if tensor.quantized else tensor.shape):
                return f"LoRA target {target.module!r} does not fit a stored weight"
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
