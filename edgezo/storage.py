"""Files that matter: hashed, written whole or not at all, never outside their directory."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from edgezo.errors import EdgezoError

CHUNK_BYTES = 1 << 23
JOURNAL = "journal.bin"  # what makes a directory a run
PART = ".part"  # ends the name of a file that is being written
NAME_BYTES_LIMIT = 255  # of a file name, on every system in use


def sha256_file(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def is_run(directory: Path) -> bool:
    """Whether it is the directory of a run."""
    return (directory / JOURNAL).is_file()


def is_plain_name(name: str) -> bool:
    """Whether `name` is one file name: no folder, no drive, no way out of its directory."""
    if not name.isprintable() or not 0 < len(name.encode()) <= NAME_BYTES_LIMIT:
        return False
    return name not in {".", ".."} and not set(name) & set("/\\:") and PurePosixPath(name).name == name


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` through a temporary file, fsync and rename; a failed write leaves the old file."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    """Make a rename survive a loss of power, where the system can (Windows cannot open a directory)."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def refuse_existing(path: Path, error: type[EdgezoError], advice: str, leftover: Callable[[str], bool] = lambda name: False) -> None:
    """Raise `error` when `path` exists and is not an empty directory; files whose name is a `leftover` do not count."""
    if path.is_dir() and all(leftover(entry.name) for entry in path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise error(f"{path}: exists already; {advice}")


@contextmanager
def directory_in_the_making(path: Path) -> Iterator[Path]:
    """A hidden sibling directory to fill; synced and renamed to `path` when the block ends well, removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.making."))
    try:
        yield making
        for file in making.iterdir():
            with open(file, "r+b") as written:
                os.fsync(written.fileno())
        os.chmod(making, 0o755)
        if path.is_dir():
            path.rmdir()
        os.replace(making, path)
    except BaseException:
        remove_tree(making)
        raise
    _sync_directory(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a directory made by this process, as far as the system lets us."""
    import shutil

    shutil.rmtree(path, ignore_errors=True)
