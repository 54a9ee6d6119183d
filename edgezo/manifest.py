"""The contract between the halves: what an edge model directory holds."""

import math
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field

from edgezo.adapters import Adapter, LoraTarget, Record
from edgezo.quantization import Precision, Quantized
from edgezo.storage import write_atomically

FORMAT: Final = "edgezo-edge-model"
VERSION: Final = 8
# 2 added adapter, weights, quantized tensors, config; 3 families and classes; 4 pooling, head; 5 probes; 6 float16; 7 copies of LoRA in the generation graph; 8 reading; what older ones have means the same
READABLE = (1, 2, 3, 4, 5, 6, 7, 8)
HEAD_VERSION: Final = 4  # graphs before it have no inputs for rows of the head
READING_VERSION: Final = 8
MANIFEST_NAME = "manifest.json"
MANIFEST_BYTES_LIMIT = 64 << 20
ALIGNMENT = 4096  # bytes; every tensor starts on a page, so that any system can map it
ITEM_BYTES = {"float32": 4, "float16": 2, "int64": 8, "bool": 1, "uint8": 1}

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
    dtype: Literal["float32", "float16", "int64", "bool", "uint8"]
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
    quantization_loss_change: nats a token of the probes that rounding the weights cost; None for fp32.
    half_log_prob_difference: largest_log_prob_difference with products rounded to float16; None unless weights are.
    """

    largest_log_prob_difference: float
    greedy_tokens_equal: int | None = None
    onnxruntime: str
    quantization_loss_change: float | None = None
    half_log_prob_difference: float | None = None


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
    the architecture's own head. head: weight of the vocabulary projection. probes: output projections of attention, from lower layers to upper
    ones, that the graphs take a probe of the attention at. reading: how the runs that were merged last read rows, by the names of
    `READING_SETTINGS`; None where there are none or they differ.
    """

    format: Literal["edgezo-edge-model"] = FORMAT
    version: Literal[1, 2, 3, 4, 5, 6, 7, 8] = VERSION
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
    probes: list[LoraTarget] = Field(default_factory=list)
    verification: Verification | None = None
    tuned: list[Tuned] = Field(default_factory=list)
    reading: dict[str, Any] | None = None
    files: dict[str, StoredFile]

    @property
    def tunable(self) -> list[Tensor]:
        """The tensors tuning may change, in their order in the file."""
        return [tensor for tensor in self.tensors if tensor.tunable]

    @property
    def tunable_size(self) -> int:
        """Number of tunable parameters."""
        return sum(tensor.size for tensor in self.tunable)

    @property
    def takes_head_rows(self) -> bool:
        """Whether the graphs can be fed rows of the head."""
        return self.version >= HEAD_VERSION and "hidden" in self.scoring.outputs

    def write(self, directory: Path) -> None:
        """Write manifest.json whole or not at all."""
        write_atomically(directory / MANIFEST_NAME, (self.model_dump_json(indent=1) + "\n").encode())
