"""A long conversation: what does not fit goes, only what is new is read, and an interrupt ends an answer alone."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Chat
from conversations import InterruptingOutput, replies, reply, said, shown

from edgezo.chat import Conversation
from edgezo.errors import DataError, NonFiniteLossError
from edgezo.runtime.generate import Cache, generate
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.prefix import Prefix

FORGOTTEN = "  {} forgotten: the conversation no longer fits the context of 128 tokens\n"


class RaisingLines:
    """Standard input at which Ctrl-C is pressed after its lines."""

    def __init__(self, text: str) -> None:
        self.lines = io.StringIO(text)

    def isatty(self) -> bool:
        return False

    def readline(self) -> str:
        if line := self.lines.readline():
            return line
        raise KeyboardInterrupt


class Counting:
    """A session that remembers how many tokens each run was fed."""

    def __init__(self, session: Any) -> None:
        self.session, self.fed = session, list[int]()

    def run(self, outputs: list[str], feeds: Mapping[str, Any]) -> Any:
        self.fed.append(feeds["input_ids"].shape[1])
        return self.session.run(outputs, feeds)


# the context


def test_the_oldest_exchange_goes_when_the_context_is_full(chat: Chat, model: EdgeModel) -> None:
    first, second = replies(model, "x" * 40, "y" * 20)
    third = reply(model, said("y" * 20, second, "z" * 10))  # 127 tokens with the first exchange
    fourth = reply(model, said("z" * 10, third, "z" * 40))
    lines = f"{'x' * 40}\n{'y' * 20}\n{'z' * 10}\n{'z' * 40}\n"
    assert chat(lines) == (0, shown([first, second, third, fourth]), FORGOTTEN.format("the oldest exchange") * 2)


def test_several_exchanges_go_at_once_and_the_system_message_never(chat: Chat, model: EdgeModel) -> None:
    first, second = replies(model, "x" * 6, "y" * 6, system="s")
    third = reply(model, said("z" * 80, system="s"))
    assert chat(f"{'x' * 6}\n{'y' * 6}\n{'z' * 80}\n", "--system", "s") == (
        0,
        shown([first, second, third]),
        FORGOTTEN.format("the 2 oldest exchanges"),
    )


def test_a_message_that_does_not_fit_is_refused_and_nothing_is_forgotten(chat: Chat, model: EdgeModel) -> None:
    count = len(model.text.encode(model.text.chat(said("x" * 128), reply=True), special=False))
    error = f"error: the message alone has {count} tokens in the chat template, the model's context is 128; shorten it\n"
    assert chat(f"the film\n{'x' * 128}\nis great\n") == (0, shown(replies(model, "the film", "is great")), error)


def test_a_message_that_fits_without_much_room_is_answered_until_the_context_ends(model: EdgeModel) -> None:
    around = len(model.text.encode(model.text.chat(said(""), reply=True), special=False))
    conversation = Conversation(model, 50, None, None)
    conversation.answer("x" * (127 - around))
    conversation.exchanges.clear()
    with pytest.raises(DataError, match="the message alone has 128 tokens"):
        conversation.answer("x" * (128 - around))


def test_the_prefix_takes_its_part_of_the_context(prefix_dir: Path) -> None:
    model = EdgeModel(prefix_dir, threads=1)
    assert isinstance(model.adapter, Prefix)
    around = len(model.text.encode(model.text.chat(said(""), reply=True), special=False))
    longest = 127 - model.adapter.prefix_tokens
    conversation = Conversation(model, 50, None, None)
    conversation.answer("x" * (longest - around))
    assert conversation.exchanges[0][1]["content"]
    with pytest.raises(DataError, match=f"the message alone has {longest + 1} tokens"):
        conversation.answer("x" * (longest + 1 - around))


# what the engine has read


@pytest.mark.parametrize("kind", ["exported", "lora", "prefix"])
def test_only_what_is_new_is_read(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    model = EdgeModel(request.getfixturevalue(f"{kind}_dir"), threads=1)
    counting = Counting(model.generation)
    model.__dict__["generation"] = counting
    conversation = Conversation(model, 4, None, None)
    texts = ["the film", "is great", "Paris?"]
    before: list[int] = []
    for text in texts:
        counting.fed.clear()
        conversation.answer(text)
        history = [message for exchange in conversation.exchanges[:-1] for message in exchange]
        tokens = model.text.encode(model.text.chat([*history, *said(text)], reply=True), special=False)
        shared = next((place for place, pair in enumerate(zip(before, tokens, strict=False)) if pair[0] != pair[1]), len(before))
        assert len(counting.fed) == 4
        assert counting.fed[0] <= len(tokens) - shared
        assert counting.fed[1:] == [1, 1, 1]
        assert (shared > 8) == bool(before)
        before = tokens  # the answer may have other tokens when it is read than when it was written
    assert capsys.readouterr().out == shown(replies(model, *texts, tokens=4))


def test_a_text_that_differs_is_read_from_there_on(model: EdgeModel) -> None:
    cache = Cache()
    for prompt in ["the film is great", "the film is long and terrible", "the film is", "the film is", "Paris", "the plot"]:
        assert "".join(generate(model, prompt, 9, cache=cache)) == model.generate(prompt, 9)
        assert cache.read[0][: len(model.text.encode(prompt))] == model.text.encode(prompt)


def test_a_generation_that_is_left_halfway_can_be_read_on(model: EdgeModel) -> None:
    cache = Cache()
    pieces = generate(model, "the film", 20, cache=cache)
    started = next(pieces) + next(pieces)
    del pieces
    assert len(cache.read[0]) >= len(model.text.encode("the film")) + 1
    assert "".join(generate(model, f"the film{started}", 8, cache=cache)) == model.generate(f"the film{started}", 8)


# stopping


@pytest.mark.parametrize("count", [1, 3])
def test_an_interrupt_ends_the_answer_and_the_conversation_goes_on(
    chat: Chat, model: EdgeModel, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    pieces = list(generate(model, model.text.chat(said("a"), reply=True), 6, special=False))
    begun = "".join(pieces[:count])
    second = reply(model, said("a", begun, "b"))
    monkeypatch.setattr("sys.stdout", output := InterruptingOutput(at=count))
    code, _, err = chat("a\nb\n")
    assert (code, err) == (0, "  stopped\n")
    assert "".join(output.writes) == f"{begun}\n{second}\n"


def test_an_interrupt_before_the_first_word_takes_the_message_back(
    model: EdgeModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted:
        def run(self, outputs: list[str], feeds: Mapping[str, Any]) -> None:
            signal.raise_signal(signal.SIGINT)

    conversation = Conversation(model, 6, None, None)
    conversation.answer("the film")
    with monkeypatch.context() as context:
        context.setitem(model.__dict__, "generation", Interrupted())
        conversation.answer("a")
    conversation.answer("is great")
    first, second = replies(model, "the film", "is great")
    assert capsys.readouterr() == (f"{first}\n\n{second}\n", "  stopped before the first word; the message is forgotten\n")


def test_an_interrupt_at_the_prompt_leaves(chat: Chat, model: EdgeModel) -> None:
    assert chat(RaisingLines("the film\n")) == (0, shown(replies(model, "the film")), "")


def test_a_message_that_cannot_be_answered_is_taken_back(model: EdgeModel) -> None:
    conversation = Conversation(model, 6, None, None)
    conversation.answer("the film")
    kept = model.weights["model.norm.weight"].copy()
    model.weights["model.norm.weight"][3] = np.nan
    with pytest.raises(NonFiniteLossError):
        conversation.answer("a")
    model.weights["model.norm.weight"][...] = kept
    assert [text["content"] for text, _ in conversation.exchanges] == ["the film"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_a_person_sees_prompt_marks(exported_dir: Path, model: EdgeModel, tmp_path: Path) -> None:
    import pty

    terminal, side = pty.openpty()
    command = [sys.executable, "-m", "edgezo", "chat", str(exported_dir), "--threads", "1", "--max-tokens", "6"]
    with subprocess.Popen(command, stdin=side, stdout=side, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stderr is not None
        assert process.stderr.readline().decode() == f"  {exported_dir}; /help shows the commands\n"
        os.write(terminal, b"the film\n\x04")
        assert process.wait(60) == 0
        assert process.stderr.read() == b""
    found = os.read(terminal, 1 << 16).decode().replace("\r\n", "\n")
    os.close(side)
    os.close(terminal)
    (answer,) = replies(model, "the film")
    assert found.replace("the film\n", "", 1) == f"> {answer}\n> \n"  # what was typed is echoed before or after the mark
