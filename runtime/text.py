"""Text to tokens and back, and the model's own chat template."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from edgezo.errors import DataError, EdgeModelError, first_line
from edgezo.manifest import TokenizerFacts

Message = dict[str, str]
TOKENIZER_BYTES_LIMIT = 1 << 28
TEMPLATE_BYTES_LIMIT = 1 << 20


class TextError(DataError):
    """A text that cannot be encoded or rendered; who read it from a file adds the place."""


class TextCodec:
    """The tokenizer of an edge model.

    Args:
        directory: the edge model.
        facts: its manifest's tokenizer entry.
    """

    def __init__(self, directory: Path, facts: TokenizerFacts) -> None:
        self.facts = facts
        path = directory / facts.file
        _refuse_large(path, TOKENIZER_BYTES_LIMIT)
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tokenizers raises bare Exception, and PanicException, which is none
            raise EdgeModelError(f"{path}: not readable as a tokenizer ({error}); export the model again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._prompt: tuple[tuple[str, bool], list[int]] | None = None  # the last one: a row's candidates stand after the same
        self._beginnings: dict[tuple[int, str | None], npt.NDArray[np.bool_]] = {}
        self._template = _read_template(directory / facts.chat_template) if facts.chat_template else None

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`; with the special tokens the model's tokenizer puts around a text, unless `special` is False."""
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        except (TypeError, UnicodeEncodeError):
            raise TextError(f"{text[:40]!r}: half a surrogate pair in it, which is no UTF-8 text; save it as UTF-8") from None
        return ids

    def beginnings(self, size: int, stop: str | None) -> npt.NDArray[np.bool_]:
        """Which tokens begin a text: bool [size], those that are no special token, no white space alone, and without `stop`; all where none is."""
        key = (size, stop)
        if key not in self._beginnings:
            texts = self._tokenizer.decode_batch([[token] for token in range(size)], skip_special_tokens=True)
            found = np.array([bool(text.strip()) and (stop is None or stop not in text) for text in texts])
            found[[token for token in self.facts.eos_token_ids if token < size]] = False
            self._beginnings[key] = found if found.any() else np.ones(size, np.bool_)
        return self._beginnings[key]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def around(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """Token ids of `text`, between the special tokens that the model's tokenizer puts before and after it."""
        alone, whole = self.encode(text, special=False), self.encode(text)
        for first in range(len(whole) - len(alone) + 1):
            if whole[first : first + len(alone)] == alone:
                return whole[:first], alone, whole[first + len(alone) :]
        raise TextError(f"{text[:40]!r}: this model's tokenizer reads it apart between special tokens; use another model")

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Token ids as the vocabulary writes them."""
        return [self._tokenizer.id_to_token(token) or str(token) for token in ids]

    def split(self, prompt: str, completion: str, special: bool = True) -> tuple[list[int], list[int]]:
        """Token ids of prompt and completion, encoded together so that a word at the seam has the tokens it has in running text."""
        if self._prompt is None or self._prompt[0] != (prompt, special):
            self._prompt = (prompt, special), self.encode(prompt, special)
        alone, whole = self._prompt[1], self.encode(prompt + completion, special)
        shared = 0
        while shared < min(len(alone), len(whole) - 1) and alone[shared] == whole[shared]:
            shared += 1
        return whole[:shared], whole[shared:]

    def chat(self, messages: Sequence[Message], reply: bool = False) -> str:
        """Render messages with the model's chat template; `reply` opens the assistant's turn.

        Raises:
            DataError: the model has no chat template.
            TextError: its template refuses the messages.
        """
        if self._template is None:
            raise DataError("this model has no chat template, so rows of messages cannot be used; use prompt and completion")
        try:
            text: str = (
                _environment()
                .from_string(self._template)
                .render(messages=list(messages), add_generation_prompt=reply, **self.facts.special_tokens)
            )
        except Exception as error:  # a template is a program: besides jinja2's own errors it raises whatever its operations raise
            raise TextError(f"the model's chat template refuses these messages: {first_line(error)}") from error
        return text


def _refuse_large(path: Path, limit: int) -> None:
    if path.stat().st_size > limit:
        raise EdgeModelError(f"{path}: larger than {limit} bytes; export the model again")


def _read_template(path: Path) -> str:
    _refuse_large(path, TEMPLATE_BYTES_LIMIT)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise EdgeModelError(f"{path}: not UTF-8 text ({error.reason}); copy or export the edge model again") from None


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """What chat templates are written for: the settings and names that transformers gives them."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment
