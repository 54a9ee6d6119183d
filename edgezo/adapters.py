"""What an adapter is, for both halves: records of the manifest, names of tensors and of graph inputs."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

# LoRA, stacked: B_k = B + rows_k signs_k^T, one rank-one perturbation a copy (A likewise); docs/adapters.md
B_ROWS, B_SIGNS = "lora_B_rows", "lora_B_signs"  # float32 [directions, sides, rank, targets], int8 [directions, sum of out_features]
A_ROWS, A_SIGNS = "lora_A_rows", "lora_A_signs"  # float32 [directions, sides, targets, rank], int8 [directions, sum of in_features]
A, B = "lora_A", "lora_B"  # tensors of LoRA
HEAD_TOKENS, HEAD_ROWS = "head_tokens", "head_rows"  # int64 [K], float32 [width, K]: what rows of the head are changed by
# a probe of the attention, written into the residual stream: float32 [layers, in_features, R] and [R, out_features]
PROBE_A, PROBE_B = "probe_A", "probe_B"
PROBE_ROWS, ATTENTION = "probe_rows", "attention"  # int64 [P] in, float32 [P, layers * in_features] out
OPTIONAL_INPUTS = {HEAD_TOKENS, HEAD_ROWS, PROBE_A, PROBE_B, PROBE_ROWS}  # of an exact start; by default they change nothing
PREFIX = "prefix"  # float32 [layers, 2 (key, value), heads, tokens, head_dim]


class Record(BaseModel):
    """Strict and immutable: unknown fields, wrong types, NaN and infinity are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class LoraTarget(Record):
    """One linear layer y = W x with a branch point: y + alpha/rank * B A x. W is stored as [out, in] if `out_first`, else [in, out]."""

    module: str = Field(min_length=1)
    in_features: int = Field(gt=0)
    out_features: int = Field(gt=0)
    out_first: bool

    @property
    def a(self) -> str:
        """Graph input [1, in_features, rank]: alpha/rank * A, transposed."""
        return f"{self.module}.lora_A.weight"

    @property
    def b(self) -> str:
        """Graph input [1, rank, out_features]: B, transposed."""
        return f"{self.module}.lora_B.weight"


class Adapter(Record):
    """What the graphs of an edge model are prepared for. `tokens` is the length of a prefix."""

    kind: Literal["lora", "prefix"]
    targets: list[LoraTarget] = Field(default_factory=list)
    tokens: int = Field(default=0, ge=0)


def prefix_inputs(layer: int) -> tuple[str, str]:
    """Graph inputs [directions, heads, tokens, head_dim] of the keys and values before the first token of one layer."""
    return f"{PREFIX}.{layer}.key", f"{PREFIX}.{layer}.value"
