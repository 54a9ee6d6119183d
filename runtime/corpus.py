"""Plain text that is no task: .txt and .md files, packed into rows of equal length.

    t = d_1 e d_2 e ... e d_n,    row r = t[r L : (r + 1) L]

d are the documents' tokens, e the end-of-text token, L the length of a row. The first token of a row is given, all others are learned.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from edgezo.config import ROW_FORMATS
from edgezo.errors import DataError
from edgezo.runtime.data import Row, read_rows
from edgezo.runtime.examples import Example
from edgezo.runtime.tasks import Task
from edgezo.runtime.text import TextCodec
from edgezo.storage import sha256_file

SUFFIXES = {".txt", ".md"}
ROW_TOKENS = 256  # when --max-length is not given
LEAST_ROW_TOKENS = 16  # a short text is cut into shorter rows, down to this
WARNING = "plain text: forward passes pick up its style and format, not facts to ask for later; docs/texts.md tells what to expect"


class Packed(NamedTuple):
    """Rows cut from documents. `tokens` counts those of all documents, `length` is that of a whole row."""

    examples: list[Example]
    files: int
    tokens: int
    length: int

    def __str__(self) -> str:
        """What was read and made of it."""
        counted = (f"{number} {noun}{'' if number == 1 else 's'}" for number, noun in ((self.files, "file"), (self.tokens, "token")))
        rows = len(self.examples)
        return f"{', '.join(counted)}, {rows} row{'' if rows == 1 else 's'} of {self.length} tokens"


def is_corpus(path: str | os.PathLike[str]) -> bool:
    """Whether a data path holds plain text: a folder, or a .txt or .md file."""
    return Path(path).is_dir() or Path(path).suffix.lower() in SUFFIXES


def packs(path: str | os.PathLike[str], task: Task) -> bool:
    """Whether rows of this path are cut from joined documents; a row of any other file stays a row."""
    return task.kind == "text" and is_corpus(path)


def read_data(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a data file; of plain text one a document, its field `text`.

    Raises:
        DataError: it is missing, has no text, or cannot be read (the file is named).
    """
    path = Path(path)
    if not is_corpus(path) or not path.exists():
        return read_rows(path)
    files = [path] if path.is_file() else list(text_files(path).values())
    if not files:
        raise DataError(f"{path}: no .txt or .md file in this folder; put plain text into it, or give rows in a {ROW_FORMATS} file")
    rows = [Row({"text": text}, str(file)) for file in files if (text := _read_text(file)).strip()]
    if not rows:
        raise DataError(f"{path}: no text in it" if path.is_file() else f"{path}: no text in its .txt and .md files, {len(files)} in all")
    return rows


def text_files(folder: Path) -> dict[str, Path]:
    """The .txt and .md files below a folder by relative path with `/`, in its order; hidden ones and links are left out.

    Raises:
        DataError: a folder cannot be read.
    """
    found: dict[str, Path] = {}
    for place, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(place, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() in SUFFIXES and path.is_file() and not path.is_symlink():
                found[path.relative_to(folder).as_posix()] = path
    return dict(sorted(found.items()))


def sha256_data(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a data file; of a folder that over the names and contents of its text files, as 64 hexadecimal digits."""
    path = Path(path)
    if not path.is_dir():
        return sha256_file(path)
    digest = hashlib.sha256()
    for name, file in text_files(path).items():
        encoded = name.encode("utf-8", "surrogateescape")
        digest.update(len(encoded).to_bytes(8, "little") + encoded + bytes.fromhex(sha256_file(file)))
    return digest.hexdigest()


def pack(documents: Sequence[Row], text: TextCodec, max_length: int | None, context: int, least_rows: int = 1) -> Packed:
    """Cut documents into rows.

    Args:
        documents: as `read_data` gives them.
        max_length: tokens of a row, at most `context`. None takes 256, or less where a short text would not make `least_rows` rows.

    Raises:
        DataError: there are not two tokens.
    """
    tokens = join(documents, text)
    if len(tokens) < 2:
        raise DataError(
            f"{documents[0].place}: {len(tokens)} token{'' if len(tokens) == 1 else 's'} in all; a row needs two, the first is given and the second learned"
        )
    chosen = max_length or min(ROW_TOKENS, max(LEAST_ROW_TOKENS, len(tokens) // least_rows))
    length = min(chosen, context, len(tokens))
    rows = [tokens[start : start + length] for start in range(0, len(tokens), length)]
    return Packed([Example([(row[:1], row[1:])], 0) for row in rows if len(row) > 1], len(documents), len(tokens), length)


def join(documents: Sequence[Row], text: TextCodec) -> list[int]:
    """Tokens of the documents with an end-of-text token between them."""
    joined, end = list[int](), text.facts.eos_token_ids[:1]
    for number, document in enumerate(documents):
        if number and joined[-1:] != end:  # some tokenizers end every text with it
            joined += end
        joined += text.encode(document.fields["text"])
    return joined


def _read_text(path: Path) -> str:
    """A file as text with line feeds, without byte order mark."""
    try:
        content = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        _refuse(error)
    return content.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _refuse(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename}: cannot be read ({error.strerror}); make it readable or take it out of the data")
