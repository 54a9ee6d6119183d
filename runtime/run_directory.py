"""Writing a run directory: held by one process, refused where it does not fit, its journal opened."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from edgezo.config import TuneConfig
from edgezo.errors import RunError
from edgezo.runtime.journal import Journal
from edgezo.runtime.journal_reader import read_journal
from edgezo.runtime.journal_records import Record
from edgezo.runtime.run import CONFIG, INIT, LOCK, MAY_CHANGE, METRICS, SUMMARY, Run, read_run
from edgezo.storage import JOURNAL, PART, is_run, refuse_existing, write_atomically


@contextmanager
def held_run(output: Path, resume: bool) -> Iterator[Run | None]:
    """Hold a run directory: the new one is made, and taken away again when work fails before its first step.

    The lock is the system's own on an open file, so it ends with its process, however that ends.

    Yields:
        What the directory holds, read under the lock; None for a new run.

    Raises:
        RunError: it exists already, or holds no run to resume; another process has it; it cannot be written.
    """
    if resume:
        read_run(output)
    else:
        _refuse_taken(output)
    made = not output.exists()
    lock = FileLock(output / LOCK)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise RunError(f"{output}: another process is tuning this run; wait until it ends or stop it") from None
    except OSError as error:
        mend = "make it writable or copy it" if resume else "choose another directory"
        raise RunError(f"{output}: cannot be written ({error.strerror or error}); {mend}") from error
    kept = True
    try:
        if not resume:
            _refuse_taken(output)
        kept = resume
        _remove_parts(output)
        if not resume:
            (output / INIT).unlink(missing_ok=True)  # of a process that ended before it had a journal
        yield read_run(output) if resume else None
        kept = True
    except OSError as error:
        kept = resume or _has_steps(output / JOURNAL)
        advice = "whole steps so far are kept, go on with --resume when it can be written" if kept else "choose another directory"
        raise RunError(f"{output}: cannot be written ({error.strerror or error}); {advice}") from error
    finally:
        kept = kept or _has_steps(output / JOURNAL)
        lock.release()
        for name in () if kept else (LOCK, CONFIG, JOURNAL, METRICS, INIT):
            (output / name).unlink(missing_ok=True)
        if made and not kept:
            _remove_parts(output)
            output.rmdir()


def open_journal(output: Path, config: TuneConfig, header: dict[str, Any], previous: Run | None, start: Sequence[Record] = ()) -> Journal:
    """The journal to append to: a new one with its first records, or that of the run to continue, with the settings that hold from now on."""
    if previous is None:
        journal = Journal.create(output / JOURNAL, header, start)
    else:
        journal = Journal.reopen(output / JOURNAL, previous.journal)
        old, new = previous.config.model_dump(), config.model_dump()
        changed = {name: new[name] for name in sorted(MAY_CHANGE) if new[name] != old[name]}
        if changed:
            journal.change(changed)
    write_atomically(output / CONFIG, (config.model_dump_json(indent=1) + "\n").encode())
    return journal


def write_summary(directory: Path, summary: dict[str, Any]) -> None:
    """Write summary.json whole or not at all."""
    write_atomically(directory / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())


def _refuse_taken(output: Path) -> None:
    """Refuse a place that is not free for a new run."""
    advice = "continue it with --resume or choose another directory" if is_run(output) else "it holds no run, choose another directory"
    refuse_existing(output, RunError, advice, lambda name: _is_leftover(name) or name == INIT)


def _is_leftover(name: str) -> bool:
    """The lock, or a file that a killed process was writing."""
    return name == LOCK or (name.startswith(".") and name.endswith(PART))


def _remove_parts(output: Path) -> None:
    for path in output.iterdir():
        if path.name != LOCK and _is_leftover(path.name):
            path.unlink()


def _has_steps(journal: Path) -> bool:
    try:
        contents = read_journal(journal)
        return bool(contents.records or contents.undos)
    except RunError:  # none, or a header that a full disk cut
        return False
