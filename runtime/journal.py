"""The journal, version 1: what a run is. Base weights and journal give the tuned weights. The format is docs/journal.md.

8 bytes   b"EDGEZOJ1"
4 bytes   header length n, little-endian
n bytes   header, JSON in UTF-8
4 bytes   CRC-32 of all before
16 bytes  a step: projected_grad, learning rate, loss (float32), CRC-32 of these 12 bytes continued from the last CRC
"""

import json
import os
import struct
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from edgezo.errors import RunError

MAGIC = b"EDGEZOJ1"
HEADER_BYTES_LIMIT = 1 << 20
STEP = struct.Struct("<fffI")


class StepRecord(NamedTuple):
    """The scalars of one step, exactly as stored (float32 values)."""

    projected_grad: float
    learning_rate: float
    loss: float


class JournalContents(NamedTuple):
    """What a journal file holds: its header, its whole records, and the bytes these take."""

    header: dict[str, Any]
    records: list[StepRecord]
    whole_bytes: int


class Journal:
    """An open journal; records are appended, each in one write, and reach the file before the weights change."""

    def __init__(self, path: Path, checksum: int) -> None:
        self._checksum = checksum
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  closed by close()

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> "Journal":
        """Start a journal; refuses an existing file."""
        body = json.dumps(header, ensure_ascii=False, sort_keys=True).encode()
        start = MAGIC + struct.pack("<I", len(body)) + body
        checksum = zlib.crc32(start)
        with open(path, "xb") as file:
            file.write(start + struct.pack("<I", checksum))
            file.flush()
            os.fsync(file.fileno())
        return cls(path, checksum)

    @classmethod
    def reopen(cls, path: Path, whole_bytes: int) -> "Journal":
        """Continue after the last whole record; a torn one behind it is cut off."""
        with open(path, "r+b") as file:
            file.truncate(whole_bytes)
            file.seek(whole_bytes - 4)
            (checksum,) = struct.unpack("<I", file.read(4))
        return cls(path, checksum)

    def append(self, record: StepRecord) -> StepRecord:
        """Append one step and return it as stored: the update must use the stored values."""
        body = struct.pack("<fff", *record)
        self._checksum = zlib.crc32(body, self._checksum)
        data = body + struct.pack("<I", self._checksum)
        if self._file.write(data) != len(data):
            raise OSError(28, "no space left for a whole record")
        return StepRecord(*struct.unpack("<fff", body))

    def sync(self) -> None:
        """Make all records survive a loss of power."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def read_journal(path: Path) -> JournalContents:
    """Read a journal up to its last whole record.

    Raises:
        RunError: missing, of another format, a damaged header, or a damaged record with whole ones behind it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: no readable journal ({error.strerror}); give a run directory made by edgezo tune") from None
    if data[: len(MAGIC)] != MAGIC:
        raise RunError(f"{path}: not a journal of version 1 (starts with {data[:8]!r})")
    (length,) = struct.unpack_from("<I", data, 8) if len(data) >= 12 else (HEADER_BYTES_LIMIT + 1,)
    start = 12 + length + 4
    if length > HEADER_BYTES_LIMIT or start > len(data):
        raise RunError(f"{path}: the header is cut off; the run cannot be used")
    checksum = zlib.crc32(data[: 12 + length])
    if struct.unpack_from("<I", data, 12 + length)[0] != checksum:
        raise RunError(f"{path}: the header was changed (checksum differs); the run cannot be used")
    try:
        header = json.loads(data[12 : 12 + length])
    except (ValueError, RecursionError):
        raise RunError(f"{path}: the header is not JSON; the run cannot be used") from None
    if not isinstance(header, dict):
        raise RunError(f"{path}: the header is a JSON {type(header).__name__}, not an object; the run cannot be used")
    records: list[StepRecord] = []
    position = start
    while position + STEP.size <= len(data):
        *values, stored = STEP.unpack_from(data, position)
        checksum = zlib.crc32(data[position : position + 12], checksum)
        if checksum != stored:
            if position + 2 * STEP.size <= len(data):
                raise RunError(
                    f"{path}: record of step {len(records) + 1} was changed (checksum differs) and others follow it; restore the file from a copy"
                )
            break
        records.append(StepRecord(*values))
        position += STEP.size
    return JournalContents(header, records, position)
