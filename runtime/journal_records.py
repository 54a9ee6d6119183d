"""Records of a journal: kinds, payloads, and what they stand for. The format is docs/journal.md."""

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgezo.errors import RunError
from edgezo.runtime.attention_probe import NO_PROBE
from edgezo.runtime.estimators.estimator import Estimate
from edgezo.runtime.evaluation import Evaluation
from edgezo.runtime.examples import Offsets
from edgezo.runtime.head_rows import HeadRows

MAGIC = b"EDGEZOJ4"
READABLE = (
    b"EDGEZOJ1",
    b"EDGEZOJ2",
    b"EDGEZOJ3",
    MAGIC,
)  # 2 added the record of other metrics, 3 those of the head and of an undo, 4 those of a probe and of offsets; what older ones have means the same
JOURNAL_BYTES_LIMIT = 1 << 30  # 63 million steps
HEADER_BYTES_LIMIT = 1 << 20
SETTINGS_BYTES_LIMIT = 1 << 16
STEP, DIRECTIONS, EVALUATION, METRICS, SETTINGS, HEAD, PROBE, OFFSETS, UNDO = b"S", b"D", b"E", b"M", b"C", b"H", b"P", b"O", b"U"
STEP_KINDS = (STEP, DIRECTIONS)
STEP_PAYLOAD = struct.Struct("<fff")
DIRECTIONS_PAYLOAD = struct.Struct("<Hff")  # how many projected gradients follow, learning rate, loss
DIRECTIONS_LIMIT = (1 << 16) - 1
EVALUATION_PAYLOAD = struct.Struct("<IIddd?")
HEAD_SIZES = struct.Struct("<II")  # width, tokens
PROBE_SIZES = struct.Struct("<IIIII")  # width, tokens; layers, in_features and rank of the probe
OFFSETS_SIZES = struct.Struct("<II")  # rows, candidates
NUMBERS_LIMIT = 1 << 26  # of a head and its probe, or of offsets
UNDO_PAYLOAD = struct.Struct("<If")  # steps that stay, factor on the learning rate from here on
LENGTH = struct.Struct("<I")
CHECKSUM = struct.Struct("<I")
STEP_BYTES = 1 + STEP_PAYLOAD.size + CHECKSUM.size
EVALUATION_BYTES = 1 + EVALUATION_PAYLOAD.size + CHECKSUM.size
UNDO_BYTES = 1 + UNDO_PAYLOAD.size + CHECKSUM.size
Record = tuple[bytes, bytes]  # kind and payload


class StepRecord(NamedTuple):
    """The scalars of one step, as stored (float32 values) or about to be; one projected gradient a direction, or what the rule takes for them (docs/journal.md)."""

    projected_grads: tuple[float, ...]
    learning_rate: float
    loss: float

    @classmethod
    def of(cls, estimates: Sequence[Estimate], learning_rate: float) -> "StepRecord":
        """Not yet rounded as stored; the loss is the mean of theirs."""
        loss = sum(estimate.loss for estimate in estimates) / len(estimates)
        return cls(tuple(estimate.projected_grad for estimate in estimates), learning_rate, loss)


def record_bytes(data: bytes, position: int, scalars: int) -> int:
    """Size of the record at `position` with kind and checksum; 0 for one that does not exist in a run of so many numbers a step."""
    kind = data[position : position + 1]
    if kind == STEP:
        return STEP_BYTES if scalars == 1 else 0
    if kind == DIRECTIONS:
        count = data[position + 1 : position + 3]
        if scalars == 1 or count != scalars.to_bytes(2, "little")[: len(count)]:
            return 0
        return 1 + DIRECTIONS_PAYLOAD.size + 4 * scalars + CHECKSUM.size
    if kind == EVALUATION:
        return EVALUATION_BYTES
    if kind in (HEAD, PROBE):
        layout = HEAD_SIZES if kind == HEAD else PROBE_SIZES
        body = data[position + 1 : position + 1 + layout.size]
        width, count, *probe = layout.unpack(body) if len(body) == layout.size else (NUMBERS_LIMIT // 2, 1, NUMBERS_LIMIT // 2, 1, 1)
        parts = [width * count, *([math.prod(probe)] if kind == PROBE else [])]
        whole = min(parts) > 0 and sum(parts) <= NUMBERS_LIMIT
        return 1 + layout.size + 4 * (count + sum(parts)) + CHECKSUM.size if whole else 0
    if kind == OFFSETS:
        sizes = data[position + 1 : position + 1 + OFFSETS_SIZES.size]
        count, candidates = OFFSETS_SIZES.unpack(sizes) if len(sizes) == OFFSETS_SIZES.size else (NUMBERS_LIMIT // 2, 1)
        numbers = count * (1 + candidates)
        return 1 + OFFSETS_SIZES.size + 4 * numbers + CHECKSUM.size if 0 < numbers <= NUMBERS_LIMIT else 0
    if kind == UNDO:
        return UNDO_BYTES
    if kind in (SETTINGS, METRICS):
        body = data[position + 1 : position + 1 + LENGTH.size]
        length = LENGTH.unpack(body)[0] if len(body) == LENGTH.size else SETTINGS_BYTES_LIMIT
        return 1 + LENGTH.size + length + CHECKSUM.size if length <= SETTINGS_BYTES_LIMIT else 0
    return 0


def packed_step(record: StepRecord) -> Record:
    """A step as it is written."""
    grads, rest = record.projected_grads, (record.learning_rate, record.loss)
    if len(grads) == 1:
        return STEP, STEP_PAYLOAD.pack(*grads, *rest)
    return DIRECTIONS, DIRECTIONS_PAYLOAD.pack(len(grads), *rest) + struct.pack(f"<{len(grads)}f", *grads)


def as_stored(record: StepRecord) -> StepRecord:
    """A step with the float32 values that a journal holds: updates must use these."""
    return step_record(*packed_step(record))


def step_record(kind: bytes, payload: bytes) -> StepRecord:
    if kind == STEP:
        grad, *rest = STEP_PAYLOAD.unpack(payload)
        return StepRecord((grad,), *rest)
    count, *rest = DIRECTIONS_PAYLOAD.unpack_from(payload)
    return StepRecord(struct.unpack_from(f"<{count}f", payload, DIRECTIONS_PAYLOAD.size), *rest)


def evaluation_records(step: int, evaluation: Evaluation, best: bool) -> list[Record]:
    """What an evaluation of step `step` found, and whether it is the best so far."""
    others = [json_record(METRICS, dict(evaluation.others))] if evaluation.others else []
    numbers = [math.nan if value is None else value for value in (evaluation.accuracy, evaluation.macro_f1)]
    return [*others, (EVALUATION, EVALUATION_PAYLOAD.pack(step, evaluation.rows, evaluation.loss, *numbers, best))]


def head_record(head: HeadRows) -> Record:
    """Rows of the head, which hold from here on: little-endian uint32 tokens, float32 rows [width, tokens], and of a probe float32 A."""
    rows = head.tokens.astype("<u4").tobytes() + np.ascontiguousarray(head.rows, "<f4").tobytes()
    if not head.probe.size:
        return HEAD, HEAD_SIZES.pack(*head.rows.shape) + rows
    return PROBE, PROBE_SIZES.pack(*head.rows.shape, *head.probe.shape) + rows + np.ascontiguousarray(head.probe, "<f4").tobytes()


def offsets_record(offsets: Offsets) -> Record:
    """Offsets of training rows: little-endian uint32 rows, float32 values [n, candidates]."""
    values = np.ascontiguousarray(offsets.values, "<f4").tobytes()
    return OFFSETS, OFFSETS_SIZES.pack(*offsets.values.shape) + offsets.rows.astype("<u4").tobytes() + values


def read_offsets(path: Path, payload: bytes) -> Offsets:
    count, candidates = OFFSETS_SIZES.unpack_from(payload)
    rows = np.frombuffer(payload, "<u4", count, OFFSETS_SIZES.size).astype(np.int64)
    values = np.frombuffer(payload, "<f4", -1, OFFSETS_SIZES.size + 4 * count).astype(np.float32).reshape(count, candidates)
    if not np.isfinite(values).all() or len(np.unique(rows)) != count:
        raise RunError(f"{path}: a record of offsets holds NaN, infinity or a row twice, which no run writes; the run cannot be used")
    return Offsets(rows, values)


def json_record(kind: bytes, value: dict[str, Any]) -> Record:
    body = json.dumps(value, ensure_ascii=False).encode()
    return kind, LENGTH.pack(len(body)) + body


def read_head_record(path: Path, kind: bytes, payload: bytes) -> HeadRows:
    layout = HEAD_SIZES if kind == HEAD else PROBE_SIZES
    width, count, *shape = layout.unpack_from(payload)
    tokens = np.frombuffer(payload, "<u4", count, layout.size).astype(np.int64)
    numbers = np.frombuffer(payload, "<f4", -1, layout.size + 4 * count).astype(np.float32)
    if not np.isfinite(numbers).all() or len(np.unique(tokens)) != count:
        raise RunError(f"{path}: a record of the head holds NaN, infinity or a token twice, which no run writes; the run cannot be used")
    rows = numbers[: width * count].reshape(width, count)
    return HeadRows(tokens, rows, numbers[width * count :].reshape(shape) if shape else NO_PROBE)


def read_metrics(path: Path, body: bytes) -> dict[str, float]:
    found = json_object(path, body, "a record of metrics")
    if not all(isinstance(value, float) and math.isfinite(value) for value in found.values()):
        raise RunError(f"{path}: a record of metrics holds values that none can have; the run cannot be used")
    return found


def json_object(path: Path, body: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise RunError(f"{path}: {what} is not JSON; the run cannot be used") from None
    if not isinstance(value, dict):
        raise RunError(f"{path}: {what} is a JSON {type(value).__name__}, not an object; the run cannot be used")
    return value
