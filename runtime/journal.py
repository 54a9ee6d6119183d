"""The journal, version 3: what a run is. Base weights and journal give the tuned weights. The format is docs/journal.md.

8 bytes   b"EDGEZOJ3"
4 bytes   header length n, little-endian
n bytes   header, JSON in UTF-8
4 bytes   CRC-32 of all before
records   kind (1 byte), payload, CRC-32 of kind and payload continued from the last CRC (4 bytes)
"""

import json
import math
import os
import struct
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from edgezo.errors import RunError
from edgezo.runtime.evaluation import Evaluation, best_step
from edgezo.runtime.head_rows import HeadRows
from edgezo.storage import write_atomically

MAGIC = b"EDGEZOJ3"
READABLE = (
    b"EDGEZOJ1",
    b"EDGEZOJ2",
    MAGIC,
)  # 2 added the record of other metrics, 3 those of the head and of an undo; what older ones have means the same
JOURNAL_BYTES_LIMIT = 1 << 30  # 63 million steps
HEADER_BYTES_LIMIT = 1 << 20
SETTINGS_BYTES_LIMIT = 1 << 16
STEP, DIRECTIONS, EVALUATION, METRICS, SETTINGS, HEAD, UNDO = b"S", b"D", b"E", b"M", b"C", b"H", b"U"
STEP_PAYLOAD = struct.Struct("<fff")
DIRECTIONS_PAYLOAD = struct.Struct("<Hff")  # how many projected gradients follow, learning rate, loss
DIRECTIONS_LIMIT = (1 << 16) - 1
EVALUATION_PAYLOAD = struct.Struct("<IIddd?")
HEAD_SIZES = struct.Struct("<II")  # width, tokens
HEAD_NUMBERS_LIMIT = 1 << 26
UNDO_PAYLOAD = struct.Struct("<If")  # steps that stay, factor on the learning rate from here on
LENGTH = struct.Struct("<I")
CHECKSUM = struct.Struct("<I")
STEP_BYTES = 1 + STEP_PAYLOAD.size + CHECKSUM.size
EVALUATION_BYTES = 1 + EVALUATION_PAYLOAD.size + CHECKSUM.size
UNDO_BYTES = 1 + UNDO_PAYLOAD.size + CHECKSUM.size
Record = tuple[bytes, bytes]  # kind and payload
SYNC_SECONDS = 5.0  # at most this much work is lost with the power; one sync takes 1 to 100 ms by the disk


class StepRecord(NamedTuple):
    """The scalars of one step, exactly as stored (float32 values); one projected gradient a direction."""

    projected_grads: tuple[float, ...]
    learning_rate: float
    loss: float


class JournalContents(NamedTuple):
    """What a journal file holds.

    header: as written at the start. records: the steps that stand. evaluations: of these, by step. best_step: the last one marked as best,
    None without marks. settings: those changed since the start. heads: rows of the head by the steps done before they were set. untuned: the
    evaluation before the first of them. others: metrics of the evaluation that comes next. lr_scale: factor on the learning rate that holds at
    the end; undos: how often steps were taken back. whole_bytes: bytes up to the last whole record; torn_bytes: what follows. checksum: of the
    last whole record, where the next one goes on.
    """

    header: dict[str, Any]
    records: list[StepRecord]
    evaluations: dict[int, Evaluation]
    best_step: int | None
    settings: dict[str, Any]
    whole_bytes: int
    torn_bytes: int
    checksum: int
    others: dict[str, float]
    heads: dict[int, HeadRows]
    untuned: Evaluation | None
    lr_scale: float = 1.0
    undos: int = 0

    def head_at(self, step: int) -> HeadRows | None:
        """The rows of the head that hold after `step` steps; None for those of the base."""
        return self.heads[max(held)] if (held := [place for place in self.heads if place <= step]) else None


class Journal:
    """An open journal; records are appended, each in one write, and reach the file before the weights change."""

    def __init__(self, path: Path, checksum: int) -> None:
        self._checksum = checksum
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  closed by close()
        self._synced = time.monotonic()

    @classmethod
    def create(cls, path: Path, header: dict[str, Any], start: Sequence[Record] = ()) -> "Journal":
        """Start a journal with its first records, whole or not at all; refuses an existing file."""
        body = json.dumps(header, ensure_ascii=False, sort_keys=True).encode()
        data = MAGIC + LENGTH.pack(len(body)) + body
        checksum = zlib.crc32(data)
        data += CHECKSUM.pack(checksum)
        for kind, payload in start:
            checksum = zlib.crc32(kind + payload, checksum)
            data += kind + payload + CHECKSUM.pack(checksum)
        if path.exists():
            raise FileExistsError(17, "exists already", str(path))
        write_atomically(path, data)
        return cls(path, checksum)

    @classmethod
    def reopen(cls, path: Path, contents: JournalContents) -> "Journal":
        """Continue after the last whole record; a torn one behind it is cut off."""
        with open(path, "r+b") as file:
            file.truncate(contents.whole_bytes)
            os.fsync(file.fileno())
        return cls(path, contents.checksum)

    def append(self, record: StepRecord) -> StepRecord:
        """Append one step and return it as stored: the update must use the stored values."""
        grads, rest = record.projected_grads, (record.learning_rate, record.loss)
        if len(grads) == 1:
            kind, payload = STEP, STEP_PAYLOAD.pack(*grads, *rest)
        else:
            kind, payload = DIRECTIONS, DIRECTIONS_PAYLOAD.pack(len(grads), *rest) + struct.pack(f"<{len(grads)}f", *grads)
        self._write(kind, payload)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()
        return _step_record(kind, payload)

    def mark(self, step: int, evaluation: Evaluation, best: bool) -> None:
        """Append what an evaluation of step `step` found, and whether it is the best so far; synced."""
        for record in evaluation_records(step, evaluation, best):
            self._write(*record)
        self.sync()

    def change(self, settings: dict[str, Any]) -> None:
        """Append settings that hold from here on; synced."""
        self._write(*_json_record(SETTINGS, settings))
        self.sync()

    def undo(self, step: int, lr_scale: float) -> float:
        """Append that the steps after the first `step` are taken back, and the factor on the learning rate from here on, returned as stored; synced."""
        payload = UNDO_PAYLOAD.pack(step, lr_scale)
        self._write(UNDO, payload)
        self.sync()
        return float(UNDO_PAYLOAD.unpack(payload)[1])

    def sync(self) -> None:
        """Make all records survive a loss of power."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()

    def _write(self, kind: bytes, payload: bytes) -> None:
        checksum = zlib.crc32(kind + payload, self._checksum)
        data = kind + payload + CHECKSUM.pack(checksum)
        if self._file.write(data) != len(data):
            raise OSError(28, "no space left for a whole record")
        self._checksum = checksum

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def evaluation_records(step: int, evaluation: Evaluation, best: bool) -> list[Record]:
    """What an evaluation of step `step` found, and whether it is the best so far."""
    others = [_json_record(METRICS, dict(evaluation.others))] if evaluation.others else []
    numbers = [math.nan if value is None else value for value in (evaluation.accuracy, evaluation.macro_f1)]
    return [*others, (EVALUATION, EVALUATION_PAYLOAD.pack(step, evaluation.rows, evaluation.loss, *numbers, best))]


def head_record(head: HeadRows) -> Record:
    """Rows of the head, which hold from here on: little-endian uint32 tokens, float32 rows [width, tokens]."""
    width, count = head.rows.shape
    return HEAD, HEAD_SIZES.pack(width, count) + head.tokens.astype("<u4").tobytes() + np.ascontiguousarray(head.rows, "<f4").tobytes()


def read_journal(path: Path) -> JournalContents:
    """Read a journal up to its last whole record.

    A torn end is left out: a record that is cut, or the last one with a wrong checksum, or zeros up to the end of the file (what
    some file systems leave after a loss of power).

    Raises:
        RunError: missing, of another format, a damaged header, or a damaged record with others behind it.
    """
    try:
        if path.stat().st_size > JOURNAL_BYTES_LIMIT:
            raise RunError(f"{path}: larger than {JOURNAL_BYTES_LIMIT} bytes; this is no journal")
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: no readable journal ({error.strerror}); give a run directory made by edgezo tune") from None
    header, position, checksum = _read_header(path, data)
    contents = JournalContents(header, [], {}, None, {}, position, len(data) - position, checksum, {}, {}, None)
    written = len(data.rstrip(b"\0"))
    directions = _directions(path, header)
    while position < len(data):
        size = _record_bytes(data, position, directions)
        end = position + size
        stored = CHECKSUM.unpack_from(data, end - CHECKSUM.size)[0] if size > 0 and end <= len(data) else None
        checksum = zlib.crc32(data[position : end - CHECKSUM.size], checksum)
        if stored != checksum:
            if position >= written or (size > 0 and end >= written):
                break
            raise RunError(
                f"{path}: the record after step {len(contents.records)} was changed (checksum differs) and others follow it; restore the file from a copy"
            )
        contents = _with_record(path, contents, data[position : end - CHECKSUM.size], end, checksum)
        position = end
    return contents._replace(torn_bytes=len(data) - position)


def _read_header(path: Path, data: bytes) -> tuple[dict[str, Any], int, int]:
    """Header, the position behind it and its checksum."""
    if data[: len(MAGIC)] not in READABLE:
        raise RunError(f"{path}: not a journal of version 1, 2 or 3 (starts with {data[:8]!r})")
    (length,) = LENGTH.unpack_from(data, 8) if len(data) >= 12 else (HEADER_BYTES_LIMIT + 1,)
    end = 12 + length
    if length > HEADER_BYTES_LIMIT or end + CHECKSUM.size > len(data):
        raise RunError(f"{path}: the header is cut off; the run cannot be used")
    checksum = zlib.crc32(data[:end])
    if CHECKSUM.unpack_from(data, end)[0] != checksum:
        raise RunError(f"{path}: the header was changed (checksum differs); the run cannot be used")
    return _json_object(path, data[12:end], "the header"), end + CHECKSUM.size, checksum


def _directions(path: Path, header: dict[str, Any]) -> int:
    """Projected gradients of a step, by the configuration in the header."""
    config = header.get("config")
    count = config.get("directions", 1) if isinstance(config, dict) else 1
    if not isinstance(count, int) or not 0 < count <= DIRECTIONS_LIMIT:
        raise RunError(f"{path}: the header says {count!r} directions a step; the run cannot be used")
    return count


def _record_bytes(data: bytes, position: int, directions: int) -> int:
    """Size of the record at `position` with kind and checksum; 0 for one that does not exist in a run of so many directions."""
    kind = data[position : position + 1]
    if kind == STEP:
        return STEP_BYTES if directions == 1 else 0
    if kind == DIRECTIONS:
        count = data[position + 1 : position + 3]
        if directions == 1 or count != directions.to_bytes(2, "little")[: len(count)]:
            return 0
        return 1 + DIRECTIONS_PAYLOAD.size + 4 * directions + CHECKSUM.size
    if kind == EVALUATION:
        return EVALUATION_BYTES
    if kind == HEAD:
        sizes = data[position + 1 : position + 1 + HEAD_SIZES.size]
        width, count = HEAD_SIZES.unpack(sizes) if len(sizes) == HEAD_SIZES.size else (HEAD_NUMBERS_LIMIT, 1)
        return 1 + HEAD_SIZES.size + 4 * count * (width + 1) + CHECKSUM.size if 0 < width * count <= HEAD_NUMBERS_LIMIT else 0
    if kind == UNDO:
        return UNDO_BYTES
    if kind in (SETTINGS, METRICS):
        body = data[position + 1 : position + 1 + LENGTH.size]
        length = LENGTH.unpack(body)[0] if len(body) == LENGTH.size else SETTINGS_BYTES_LIMIT
        return 1 + LENGTH.size + length + CHECKSUM.size if length <= SETTINGS_BYTES_LIMIT else 0
    return 0


def _with_record(path: Path, contents: JournalContents, record: bytes, end: int, checksum: int) -> JournalContents:
    """`contents` with one more record, whose checksum was right."""
    kind, payload = record[:1], record[1:]
    contents = contents._replace(whole_bytes=end, checksum=checksum)
    if kind in (STEP, DIRECTIONS):
        contents = contents._replace(others={})  # of an evaluation that was cut
        record_read = _step_record(kind, payload)
        contents.records.append(record_read)
        if not all(map(math.isfinite, (*record_read.projected_grads, record_read.learning_rate, record_read.loss))):
            raise RunError(f"{path}: step {len(contents.records)} holds NaN or infinity, which no run writes; the run cannot be used")
        return contents
    if kind == SETTINGS:
        return contents._replace(settings={**contents.settings, **_json_object(path, payload[LENGTH.size :], "a change of settings")})
    if kind == HEAD:
        contents.heads[len(contents.records)] = _head(path, payload)
        first = len(contents.heads) == 1 and not contents.records
        return contents._replace(untuned=contents.evaluations.get(0)) if first else contents
    if kind == METRICS:
        return contents._replace(others=_metrics(path, payload[LENGTH.size :]))
    if kind == UNDO:
        return _undone(path, contents, *UNDO_PAYLOAD.unpack(payload))
    step, rows, loss, accuracy, macro_f1, best = EVALUATION_PAYLOAD.unpack(payload)
    if step > len(contents.records):
        raise RunError(f"{path}: evaluates step {step} after step {len(contents.records)}; restore the file from a copy")
    one, other = (None if math.isnan(value) else value for value in (accuracy, macro_f1))
    if not math.isfinite(loss) or any(number is not None and not 0 <= number <= 1 for number in (one, other)):
        raise RunError(f"{path}: the evaluation of step {step} holds values that none can have; the run cannot be used")
    contents.evaluations[step] = Evaluation(rows, loss, one, other, contents.others)
    return contents._replace(others={}, best_step=step if best else contents.best_step)


def _undone(path: Path, contents: JournalContents, step: int, lr_scale: float) -> JournalContents:
    """`contents` without the steps after the first `step`, and without what was found of them."""
    made = len(contents.records)
    if step > made or not (math.isfinite(lr_scale) and lr_scale > 0):
        raise RunError(
            f"{path}: goes back to step {step} of {made} with {lr_scale:g} of the learning rate, which no run does; the run cannot be used"
        )
    kept = {number: evaluation for number, evaluation in contents.evaluations.items() if number <= step}
    del contents.records[step:]
    return contents._replace(
        evaluations=kept,
        best_step=best_step(kept, 0) if kept else None,
        heads={place: head for place, head in contents.heads.items() if place <= step},
        others={},
        lr_scale=lr_scale,
        undos=contents.undos + (step < made),
    )


def _step_record(kind: bytes, payload: bytes) -> StepRecord:
    if kind == STEP:
        grad, *rest = STEP_PAYLOAD.unpack(payload)
        return StepRecord((grad,), *rest)
    count, *rest = DIRECTIONS_PAYLOAD.unpack_from(payload)
    return StepRecord(struct.unpack_from(f"<{count}f", payload, DIRECTIONS_PAYLOAD.size), *rest)


def _json_record(kind: bytes, value: dict[str, Any]) -> Record:
    body = json.dumps(value, ensure_ascii=False).encode()
    return kind, LENGTH.pack(len(body)) + body


def _head(path: Path, payload: bytes) -> HeadRows:
    width, count = HEAD_SIZES.unpack_from(payload)
    tokens = np.frombuffer(payload, "<u4", count, HEAD_SIZES.size).astype(np.int64)
    rows = np.frombuffer(payload, "<f4", width * count, HEAD_SIZES.size + 4 * count).reshape(width, count)
    if not np.isfinite(rows).all() or len(np.unique(tokens)) != count:
        raise RunError(f"{path}: a record of the head holds NaN, infinity or a token twice, which no run writes; the run cannot be used")
    return HeadRows(tokens, np.ascontiguousarray(rows, np.float32))


def _metrics(path: Path, body: bytes) -> dict[str, float]:
    found = _json_object(path, body, "a record of metrics")
    if not all(isinstance(value, float) and math.isfinite(value) for value in found.values()):
        raise RunError(f"{path}: a record of metrics holds values that none can have; the run cannot be used")
    return found


def _json_object(path: Path, body: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise RunError(f"{path}: {what} is not JSON; the run cannot be used") from None
    if not isinstance(value, dict):
        raise RunError(f"{path}: {what} is a JSON {type(value).__name__}, not an object; the run cannot be used")
    return value
