"""Reading a journal up to its last whole record."""

import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from edgezo.config import SCALARS
from edgezo.errors import RunError
from edgezo.runtime.evaluation import Evaluation, best_step
from edgezo.runtime.examples import Offsets
from edgezo.runtime.head_rows import HeadRows
from edgezo.runtime.journal_records import (
    CHECKSUM,
    DIRECTIONS_LIMIT,
    EVALUATION_PAYLOAD,
    HEAD,
    HEADER_BYTES_LIMIT,
    JOURNAL_BYTES_LIMIT,
    LENGTH,
    MAGIC,
    METRICS,
    OFFSETS,
    PROBE,
    READABLE,
    SETTINGS,
    STEP_KINDS,
    UNDO,
    UNDO_PAYLOAD,
    StepRecord,
    json_object,
    read_head_record,
    read_metrics,
    read_offsets,
    record_bytes,
    step_record,
)


class JournalContents(NamedTuple):
    """What a journal file holds.

    header: as written at the start. records: the steps that stand. evaluations: of these, by step. best_step: the last one marked as best,
    None without marks. settings: those changed since the start. heads: rows of the head by the steps done before they were set. untuned: the
    evaluation before the first of them. others: metrics of the evaluation that comes next. lr_scale: factor on the learning rate that holds at
    the end; undos: how often steps were taken back. quiet_step: of the last rise that was the rows' alone, None after going back. last_kind: of the last whole record that changes no settings. whole_bytes: bytes up to the last whole record; torn_bytes: what follows. checksum: of the
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
    offsets: Offsets | None = None
    lr_scale: float = 1.0
    undos: int = 0
    quiet_step: int | None = None
    last_kind: bytes = b""

    def head_at(self, step: int) -> HeadRows | None:
        """The rows of the head that hold after `step` steps; None for those of the base."""
        return self.heads[max(held)] if (held := [place for place in self.heads if place <= step]) else None


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
    scalars = _scalars(path, header)
    while position < len(data):
        size = record_bytes(data, position, scalars)
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
    if not data:
        raise RunError(f"{path}: empty; restore it from a copy, or begin a new run")
    if data[: len(MAGIC)] not in READABLE:
        raise RunError(f"{path}: not a journal of version 1 to 4 (starts with {data[:8]!r})")
    (length,) = LENGTH.unpack_from(data, 8) if len(data) >= 12 else (HEADER_BYTES_LIMIT + 1,)
    end = 12 + length
    if length > HEADER_BYTES_LIMIT or end + CHECKSUM.size > len(data):
        raise RunError(f"{path}: the header is cut off; the run cannot be used")
    checksum = zlib.crc32(data[:end])
    if CHECKSUM.unpack_from(data, end)[0] != checksum:
        raise RunError(f"{path}: the header was changed (checksum differs); the run cannot be used")
    return json_object(path, data[12:end], "the header"), end + CHECKSUM.size, checksum


def _scalars(path: Path, header: dict[str, Any]) -> int:
    """Numbers of a step, by the configuration in the header: one a direction, or as many as its rule takes."""
    config = header.get("config")
    count = config.get("directions", 1) if isinstance(config, dict) else 1
    each = SCALARS.get(str(config.get("rule")), 1) if isinstance(config, dict) else 1
    if not isinstance(count, int) or not 0 < each * count <= DIRECTIONS_LIMIT:
        raise RunError(f"{path}: the header says {count!r} directions a step; the run cannot be used")
    return each * count


def _with_record(path: Path, contents: JournalContents, record: bytes, end: int, checksum: int) -> JournalContents:
    """`contents` with one more record, whose checksum was right."""
    kind, payload = record[:1], record[1:]
    last = contents.last_kind if kind == SETTINGS else kind  # what was due after a step is due after a change of settings, too
    contents = contents._replace(whole_bytes=end, checksum=checksum, last_kind=last)
    if kind in STEP_KINDS:
        contents = contents._replace(others={})  # of an evaluation that was cut
        record_read = step_record(kind, payload)
        contents.records.append(record_read)
        if not all(map(math.isfinite, (*record_read.projected_grads, record_read.learning_rate, record_read.loss))):
            raise RunError(f"{path}: step {len(contents.records)} holds NaN or infinity, which no run writes; the run cannot be used")
        return contents
    if kind == SETTINGS:
        return contents._replace(settings={**contents.settings, **json_object(path, payload[LENGTH.size :], "a change of settings")})
    if kind in (HEAD, PROBE):
        contents.heads[len(contents.records)] = read_head_record(path, kind, payload)
        first = len(contents.heads) == 1 and not contents.records
        # what was evaluated before is the untuned model; step 0 has these rows
        return contents._replace(untuned=contents.evaluations.pop(0, None)) if first else contents
    if kind == OFFSETS:
        return contents._replace(offsets=read_offsets(path, payload))
    if kind == METRICS:
        return contents._replace(others=read_metrics(path, payload[LENGTH.size :]))
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
        quiet_step=None if step < made else made if lr_scale == contents.lr_scale else contents.quiet_step,
    )
