"""A conversation in the terminal: the model's own chat template, text as it is written, and commands that switch the model."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgezo import terminal
from edgezo.config import Sampling
from edgezo.errors import ConfigError, DataError, EdgeModelError, EdgezoError
from edgezo.options import (
    DRAW,
    AdapterPath,
    Device,
    EdgeDir,
    RunDir,
    Seed,
    Step,
    Temperature,
    Threads,
    TopK,
    TopP,
    sampling_of,
    step_choice,
    step_of_run,
)

if TYPE_CHECKING:
    from edgezo.runtime.model import EdgeModel
    from edgezo.runtime.text import Message

ANSWER_TOKENS = 256
COMMANDS = {
    "/run PATH [STEP]": "use the tuned model of a run directory; STEP is a number, best or last",
    "/adapter PATH": "use an adapter of elsewhere",
    "/base": "use the base",
    "/reset": "forget the conversation",
    "/help": "show the commands; a message that begins with / wants a space before it",
    "/quit": "leave; so do Ctrl-D and, at the prompt, Ctrl-C",
}
WANTS_PATH = {usage.split()[0]: "PATH" in usage for usage in COMMANDS}


class Conversation:
    """What was said so far, and what the engine has read of it.

    Args:
        model: the edge model; it may be switched between messages, with `cache` emptied before.
        max_tokens: tokens of an answer at most.
        sampling: how to draw, with the next seed at every answer; None is greedy.
        system: what the system message says; None leaves it to the chat template.

    Raises:
        EdgeModelError: the model has no chat template.
        DataError: its template refuses a system message.
    """

    def __init__(self, model: "EdgeModel", max_tokens: int, sampling: Sampling | None, system: str | None) -> None:
        from edgezo.runtime.generate import Cache

        model.generation_facts  # noqa: B018  a model that writes no text says so
        if model.manifest.tokenizer.chat_template is None:
            raise EdgeModelError(
                f"{model.directory}: has no chat template to converse by; write text with: edgezo generate {model.directory} --prompt TEXT"
            )
        self.model, self.max_tokens, self.sampling = model, max_tokens, sampling
        self.system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.exchanges: list[tuple[Message, Message]] = []
        self.cache, self.answers = Cache(), 0
        self._render([], "hello")

    def answer(self, text: str) -> None:
        """Write the answer to a message on standard output; Ctrl-C ends it there, and what was written counts as the answer.

        Raises:
            EdgezoError: the message does not fit the context or cannot be answered; it is then as if it had not been said.
        """
        from edgezo.runtime.generate import generate

        prompt, written = self._fitted(text), list[str]()
        sampling = self.sampling and self.sampling._replace(seed=self.sampling.seed + self.answers)
        self.answers += 1
        stopped = False
        try:
            for piece in generate(self.model, prompt, self.max_tokens, sampling, special=False, cache=self.cache):
                written.append(piece)
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            stopped = True
        except EdgezoError:
            sys.stdout.write("\n" if written else "")
            raise
        sys.stdout.write("\n")
        sys.stdout.flush()
        if stopped:
            notice("stopped" if written else "stopped before the first word; the message is forgotten")
        if written or not stopped:
            self.exchanges.append(({"role": "user", "content": text}, {"role": "assistant", "content": "".join(written)}))

    def _render(self, exchanges: "list[tuple[Message, Message]]", text: str) -> str:
        said = [message for exchange in exchanges for message in exchange]
        return self.model.text.chat([*self.system, *said, {"role": "user", "content": text}], reply=True)

    def _fitted(self, text: str) -> str:
        """The rendered conversation with a new message; the oldest exchanges are dropped until it fits with room for an answer."""
        context = self.model.context
        room = min(self.max_tokens, context // 4)
        for dropped in range(len(self.exchanges) + 1):
            prompt = self._render(self.exchanges[dropped:], text)
            tokens = len(self.model.text.encode(prompt, special=False))
            if tokens + room <= context:
                break
        if tokens >= context:
            raise DataError(f"the message alone has {tokens} tokens in the chat template, the model's context is {context}; shorten it")
        if dropped:
            oldest = "the oldest exchange" if dropped == 1 else f"the {dropped} oldest exchanges"
            notice(f"{oldest} forgotten: the conversation no longer fits the context of {context} tokens")
            del self.exchanges[:dropped]
        return prompt


def chat_command(
    directory: EdgeDir,
    run: RunDir = None,
    step: Step = None,
    adapter: AdapterPath = None,
    system: Annotated[str | None, typer.Option("--system", help="Text of the system message.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens of an answer at most.")] = ANSWER_TOKENS,
    temperature: Temperature = None,
    top_k: TopK = DRAW.top_k,
    top_p: TopP = DRAW.top_p,
    seed: Seed = DRAW.seed,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Converse with the base or, with --run or --adapter, a tuned model. From a pipe, each line is a message."""
    from edgezo.runtime.model import EdgeModel
    from edgezo.runtime.sampling import check_sampling

    sampling = sampling_of(temperature, top_k, top_p, seed)
    if sampling is not None:
        check_sampling(sampling)
    model = EdgeModel(directory, threads=threads, device=device, run=run, step=step_of_run(step, run), adapter=adapter)
    conversation = Conversation(model, max_tokens, sampling, system)
    mark = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    if mark:
        model.generation  # noqa: B018  loaded before the first message rather than after it
        notice(f"{model_name(run or adapter or directory, model.step)}; /help shows the commands")
    if run is not None or adapter is None:
        tell_labels(directory, run, step_of_run(step, run))
    while (line := read_line(mark)) is not None:
        try:
            if line.startswith("/"):
                if not obey(conversation, line):
                    break
            elif line.strip():
                conversation.answer(line.strip())
        except EdgezoError as error:
            terminal.stderr().print(f"error: {error}")


def read_line(mark: str) -> str | None:
    """The next line of standard input, after `mark`; None at its end and at Ctrl-C."""
    sys.stdout.write(mark)
    sys.stdout.flush()
    try:
        return input()  # input(mark) writes its prompt to standard error where readline is not loaded
    except (EOFError, KeyboardInterrupt):
        if mark:
            sys.stdout.write("\n")
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: not UTF-8 text ({error.reason}); save it as UTF-8") from None


def obey(conversation: Conversation, line: str) -> bool:
    """Do what a line with a command says.

    Returns:
        Whether the conversation goes on.

    Raises:
        EdgezoError: there is no such command, or it cannot be done.
    """
    name, _, rest = line.strip().partition(" ")
    path = os.path.expanduser(rest.strip())
    if name not in WANTS_PATH:
        raise ConfigError(f"{name}: no such command; /help shows them")
    if WANTS_PATH[name] != bool(path):
        raise ConfigError(f"{name}: {'wants a path' if WANTS_PATH[name] else 'takes nothing after it'}; /help shows how to write it")
    if name == "/run":
        path, step = split_step(path)
        switch(conversation, path, run=path, step=step)
        tell_labels(conversation.model.directory, path, step)
    elif name == "/adapter":
        switch(conversation, path, adapter=path)
    elif name == "/base":
        switch(conversation, "base")
        tell_labels(conversation.model.directory)
    elif name == "/reset":
        conversation.exchanges.clear()
        notice("the conversation is forgotten")
    elif name == "/help":
        width = max(map(len, COMMANDS))
        for usage, text in COMMANDS.items():
            notice(f"{usage.ljust(width)}  {text}")
    return name != "/quit"


def split_step(text: str) -> tuple[str, Any]:
    """'PATH STEP' as both; a last word that is no step belongs to the path."""
    path, _, last = text.rpartition(" ")
    try:
        return (path.strip(), step_choice(last)) if path else (text, "best")
    except ConfigError:
        return text, "best"


def switch(conversation: Conversation, source: str, **chosen: Any) -> None:
    """Go on with another model, as `EdgeModel.use` takes it."""
    conversation.cache.clear()  # before, since a switch that fails may leave the base
    try:
        goes_on = "; the conversation goes on, /reset forgets it" if conversation.exchanges else ""
        notice(f"{model_name(source, conversation.model.use(**chosen))}{goes_on}")
    except OSError as error:
        raise ConfigError(f"{error.filename or source}: {error.strerror or error}") from None


def tell_labels(directory: Path, run: str | Path | None = None, step: int | str = "best") -> None:
    """Say so where what answers learned labels, so that nobody waits for what it cannot have learned."""
    from edgezo.api import recorded_reading

    if (note := terminal.labels_note(directory, run, step, recorded_reading(directory, run))) is not None:
        notice(note)


def model_name(source: str | Path, step: int | None) -> str:
    """What answers from now on."""
    return f"{source}" if step is None else f"{source}, step {step}"


def notice(text: str) -> None:
    """One line about the conversation, apart from it on standard error."""
    terminal.stderr().print(f"  {text}")
