"""A conversation: what is said stays, what does not fit goes, and each answer is that of the whole text read anew."""

import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command, Outcome

from edgezo.chat import ANSWER_TOKENS, Conversation
from edgezo.config import Sampling
from edgezo.errors import DataError, NonFiniteLossError
from edgezo.export import export_model
from edgezo.manifest_reader import read_manifest
from edgezo.runtime.generate import Cache, generate
from edgezo.runtime.lora import Lora
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.peft_folder import write_peft
from edgezo.runtime.prefix import Prefix

Message = dict[str, str]
FORGOTTEN = "  {} forgotten: the conversation no longer fits the context of 128 tokens\n"


Chat = Callable[..., Outcome]


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, invoke: Command, exported_dir: Path, tmp_path: Path) -> Chat:
    """Run `edgezo chat DIR ...` with the given lines on standard input; DIR is the shared edge model unless given."""
    monkeypatch.chdir(tmp_path)

    def call(lines: Any, *options: str, directory: str | Path = exported_dir, tokens: int = 6) -> Outcome:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines) if isinstance(lines, str) else lines)
        return invoke("chat", str(directory), "--threads", "1", "--max-tokens", str(tokens), *options)

    return call


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


class Counting:
    """A session that remembers how many tokens each run was fed."""

    def __init__(self, session: Any) -> None:
        self.session, self.fed = session, list[int]()

    def run(self, outputs: list[str], feeds: Mapping[str, Any]) -> Any:
        self.fed.append(feeds["input_ids"].shape[1])
        return self.session.run(outputs, feeds)


def random_adapter(directory: Path, folder: Path, seed: int = 0) -> Path:
    """A PEFT folder with an adapter that changes what the model says."""
    random, model = np.random.default_rng(seed), EdgeModel(directory, threads=1)
    adapter = model.adapter
    if isinstance(adapter, Prefix):
        adapter.array[...] = random.normal(size=adapter.array.shape)
    else:
        assert model.manifest.adapter is not None
        adapter = Lora(model.manifest.adapter.targets, rank=2, alpha=4.0)
        adapter.a[...], adapter.b[...] = random.normal(size=adapter.a.shape), random.normal(size=adapter.b.shape)
    folder.mkdir()
    write_peft(adapter, model.manifest, folder)
    return folder


@pytest.fixture
def run(invoke: Command, exported_dir: Path, reviews: str, tmp_path: Path) -> str:
    """A short run of the shared edge model, called `my run`, with steps that tell."""
    options = ["--data", reviews, "--template", "{text} It was", "--labels", "terrible,great", "--steps", "4", "--lr", "1e-2"]
    assert invoke("tune", str(exported_dir), "-o", str(tmp_path / "my run"), *options, "--threads", "1").code == 0
    return "my run"


# what is said


def test_each_answer_is_that_of_the_whole_conversation(chat: Chat, model: EdgeModel) -> None:
    expected = replies(model, "the film", "is great", "Paris?")
    assert len(set(expected)) == 3
    assert chat("the film\nis great\nParis?\n") == (0, shown(expected), "")


def test_a_system_message_stays_in_front(chat: Chat, model: EdgeModel) -> None:
    expected = replies(model, "the film", "is great", system="terrible")
    assert expected != replies(model, "the film", "is great")
    assert chat("the film\nis great\n", "--system", "terrible") == (0, shown(expected), "")


def test_lines_without_words_are_no_messages_and_the_last_needs_no_line_break(chat: Chat, model: EdgeModel) -> None:
    assert chat("\n  \n the film \n\t\nis great") == (0, shown(replies(model, "the film", "is great")), "")


def test_a_message_may_begin_with_a_slash_after_a_space(chat: Chat, model: EdgeModel) -> None:
    assert chat(" /quit\n") == (0, shown(replies(model, "/quit")), "")


def test_nothing_said_is_nothing_answered(chat: Chat) -> None:
    assert chat("") == (0, "", "")


def test_an_answer_ends_at_256_tokens_unless_told() -> None:
    assert ANSWER_TOKENS == 256


def test_every_answer_is_drawn_with_the_next_seed(chat: Chat, model: EdgeModel) -> None:
    first = reply(model, said("a"), 6, Sampling(seed=5))
    second = reply(model, said("a", first, "a"), 6, Sampling(seed=6))
    assert chat("a\na\n", "--temperature", "1", "--seed", "5") == (0, shown([first, second]), "")
    assert chat("a\na\n", "--seed", "5") == (0, shown(replies(model, "a", "a")), "")


def test_answers_are_written_piece_by_piece(chat: Chat, model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = list(generate(model, model.text.chat(said("a"), reply=True), 6, special=False))
    assert len(pieces) > 2
    monkeypatch.setattr("sys.stdout", output := InterruptingOutput())
    assert chat("a\n").code == 0
    assert output.writes == [*pieces, "\n"]


# commands


def test_help_shows_the_commands(chat: Chat) -> None:
    assert chat("/help\n") == (
        0,
        "",
        "  /run PATH [STEP]  use the tuned model of a run directory; STEP is a number, best or last\n"
        "  /adapter PATH     use an adapter of elsewhere\n"
        "  /base             use the base\n"
        "  /reset            forget the conversation\n"
        "  /help             show the commands; a message that begins with / wants a space before it\n"
        "  /quit             leave; so do Ctrl-D and, at the prompt, Ctrl-C\n",
    )


def test_quit_leaves_the_rest_unread(chat: Chat, model: EdgeModel) -> None:
    assert chat("the film\n/quit\nis great\n") == (0, shown(replies(model, "the film")), "")


def test_reset_forgets_what_was_said_but_not_the_system_message(chat: Chat, model: EdgeModel) -> None:
    alone = replies(model, "the film", system="terrible")
    assert chat("the film\n/reset\nthe film\n", "--system", "terrible") == (0, shown(alone * 2), "  the conversation is forgotten\n")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/foo", "/foo: no such command; /help shows them"),
        ("/", "/: no such command; /help shows them"),
        ("/reset all", "/reset: takes nothing after it; /help shows how to write it"),
        ("/run", "/run: wants a path; /help shows how to write it"),
        ("/adapter ", "/adapter: wants a path; /help shows how to write it"),
        (
            "/run none",
            "none: no such run directory; make one with: edgezo tune DIR --data FILE -o none",
        ),
        (
            "/run none here 12",
            "none here: no such run directory; make one with: edgezo tune DIR --data FILE -o none here",
        ),
        (
            "/adapter none here",
            "none here: this edge model has no branch points for adapters; export it again with --adapter lora or prefix",
        ),
    ],
)
def test_a_command_that_fails_is_one_line_and_the_conversation_goes_on(chat: Chat, model: EdgeModel, line: str, error: str) -> None:
    expected = replies(model, "the film", "is great")
    assert chat(f"the film\n{line}\nis great\n") == (0, shown(expected), f"error: {error}\n")


def test_a_path_that_the_system_refuses_is_one_line_too(chat: Chat, model: EdgeModel) -> None:
    code, out, err = chat(f"/run {'a' * 5000}\nthe film\n")
    assert (code, out, err.count("\n")) == (0, shown(replies(model, "the film")), 1)
    assert err.startswith("error: aaaa")


def test_the_model_is_switched_and_what_was_said_stays(chat: Chat, model: EdgeModel, exported_dir: Path, run: str) -> None:
    tuned = EdgeModel(exported_dir, threads=1, run=run, step=4)
    history = ["the film"]
    history += [reply(model, said(*history)), "is great"]
    history += [reply(tuned, said(*history)), "Paris?"]
    history += [reply(model, said(*history))]
    assert history[3] != reply(model, said(*history[:3]))
    lines = "the film\n/run my run 4\nis great\n/base\nParis?\n"
    assert chat(lines) == (0, shown(history[1::2]), "  my run, step 4\n  base\n")


def test_a_run_is_given_at_the_start_or_later_and_at_any_step(chat: Chat, exported_dir: Path, run: str) -> None:
    expected = shown(replies(EdgeModel(exported_dir, threads=1, run=run, step=2), "the film"))
    assert chat("the film\n", "--run", run, "--step", "2") == (0, expected, "")
    assert chat("/run my run\n/run my run last\n/run my run 2\nthe film\n") == (
        0,
        expected,
        "  my run, step 4\n  my run, step 4\n  my run, step 2\n",
    )


def test_a_switch_that_fails_leaves_the_model_that_answered(chat: Chat, exported_dir: Path, run: str) -> None:
    expected = replies(EdgeModel(exported_dir, threads=1, run=run), "the film", "is great")
    code, out, err = chat("the film\n/run my run 9\nis great\n", "--run", run)
    assert (code, out, err) == (0, shown(expected), "error: my run: step 9 was asked for, the run has steps 0 to 4\n")


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_adapters_are_switched_between_messages(chat: Chat, request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    directory: Path = request.getfixturevalue(f"{kind}_dir")
    folders = [random_adapter(directory, tmp_path / name, seed) for seed, name in enumerate(["first one", "other"])]
    models = [EdgeModel(directory, threads=1), *(EdgeModel(directory, threads=1, adapter=folder) for folder in folders)]
    history: list[str] = []
    for model, text in zip([models[1], models[2], models[0], models[1]], ["the film", "is great", "Paris?", "a"], strict=True):
        history += [text, reply(model, said(*history, text))]
    assert len({reply(model, said("the film")) for model in models}) == 3
    lines = "the film\n/adapter other\nis great\n/base\nParis?\n/adapter first one\na\n"
    found = chat(lines, "--adapter", "first one", directory=directory)
    assert found == (0, shown(history[1::2]), "  other\n  base\n  first one\n")


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


# what is refused at the start


def test_a_model_without_chat_template_is_refused(chat: Chat, edge_dir: Path) -> None:
    manifest = read_manifest(edge_dir)
    facts = manifest.tokenizer.model_copy(update={"chat_template": None})
    files = {name: file for name, file in manifest.files.items() if name != manifest.tokenizer.chat_template}
    manifest.model_copy(update={"tokenizer": facts, "files": files}).write(edge_dir)
    assert chat("the film\n", directory="edge") == (
        1,
        "",
        "error: edge: has no chat template to converse by; write text with: edgezo generate edge --prompt TEXT\n",
    )


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--temperature", "0"], "temperature must be above 0 and finite, top-k at least 0 and top-p in (0, 1]; got 0.0, 0, 1.0"),
        (["--step", "3"], "--step 3: says a step of a run, but no --run is given; add --run RUN or leave --step out"),
        (["--run", "none"], "none: no such run directory; make one with: edgezo tune DIR --data FILE -o none"),
        (["--run", "a", "--adapter", "b"], "--run a and --adapter b: two models were asked for; give one of the two"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_used_is_refused_before_anything_is_said(chat: Chat, options: list[str], error: str) -> None:
    assert chat("the film\n", *options) == (1, "", f"error: {error}\n")


def test_a_system_message_that_the_template_refuses_is_told_at_the_start(chat: Chat, source_dir: Path, tmp_path: Path) -> None:
    strict = Path(shutil.copytree(source_dir, tmp_path / "strict"))
    (strict / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}{{ messages[-1]['content'] }}",
        encoding="utf-8",
    )
    directory = export_model(str(strict), tmp_path / "edge-strict").directory
    error = "error: the model's chat template refuses these messages: no system message\n"
    assert chat("the film\n", "--system", "s", directory=directory) == (1, "", error)
    assert chat("the film\n", directory=directory).code == 0


def test_standard_input_that_is_no_text_is_refused(chat: Chat) -> None:
    stream = io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8")
    assert chat(stream) == (1, "", "error: standard input: not UTF-8 text (invalid start byte); save it as UTF-8\n")
