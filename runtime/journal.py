"""The journal, version 4: what a run is. Base weights and journal give the tuned weights. The format is docs/journal.md.

8 bytes   b"EDGEZOJ4"
4 bytes   header length n, little-endian
n bytes   header, JSON in UTF-8
4 bytes   CRC-32 of all before
records   kind (1 byte), payload, CRC-32 of kind and payload continued from the last CRC (4 bytes)
"""

import json
import os
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from edgezo.runtime.evaluation import Evaluation
from edgezo.runtime.journal_reader import JournalContents
from edgezo.runtime.journal_records import (
    CHECKSUM,
    LENGTH,
    MAGIC,
    SETTINGS,
    UNDO,
    UNDO_PAYLOAD,
    Record,
    StepRecord,
    evaluation_records,
    json_record,
    packed_step,
    step_record,
)
from edgezo.storage import write_atomically

SYNC_SECONDS = 5.0  # at most this much work is lost with the power; one sync takes 1 to 100 ms by the disk


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
        kind, payload = packed_step(record)
        self._write(kind, payload)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()
        return step_record(kind, payload)

    def mark(self, step: int, evaluation: Evaluation, best: bool) -> None:
        """Append what an evaluation of step `step` found, and whether it is the best so far; synced."""
        for record in evaluation_records(step, evaluation, best):
            self._write(*record)
        self.sync()

    def change(self, settings: dict[str, Any]) -> None:
        """Append settings that hold from here on; synced."""
        self._write(*json_record(SETTINGS, settings))
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
