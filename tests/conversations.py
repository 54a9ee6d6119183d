"""What tests of conversations share: messages, and the answers of a model that reads all of them anew."""

import io
import signal

from edgezo.config import Sampling
from edgezo.runtime.generate import generate
from edgezo.runtime.model import EdgeModel

Message = dict[str, str]


def said(*texts: str, system: str | None = None) -> list[Message]:
    """Messages of user and assistant in turn."""
    start = [] if system is None else [{"role": "system", "content": system}]
    return start + [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def reply(model: EdgeModel, messages: list[Message], tokens: int = 6, sampling: Sampling | None = None) -> str:
    """The answer to messages, all of them read anew."""
    return "".join(generate(model, model.text.chat(messages, reply=True), tokens, sampling, special=False))


def replies(model: EdgeModel, *texts: str, system: str | None = None, tokens: int = 6) -> list[str]:
    """The answers to texts said one after the other."""
    history: list[str] = []
    for text in texts:
        history += [text, reply(model, said(*history, text, system=system), tokens)]
    return history[1::2]


def shown(answers: list[str]) -> str:
    """Answers as they are written."""
    return "".join(f"{answer}\n" for answer in answers)


class InterruptingOutput(io.StringIO):
    """Standard output that keeps what it was written piece by piece, with Ctrl-C pressed after piece number `at`."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.at, self.writes = at, list[str]()

    def write(self, text: str, /) -> int:
        if text:
            self.writes.append(text)
            if len(self.writes) == self.at:
                signal.raise_signal(signal.SIGINT)
        return len(text)
