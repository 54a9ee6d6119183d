"""`edgezo rate`: a person's choice between generated answers, kept as preference rows that `edgezo tune` learns from."""

import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgezo import terminal
from edgezo.chat import ANSWER_TOKENS, notice, read_line
from edgezo.config import ROW_SUFFIXES, Sampling
from edgezo.errors import DataError, EdgeModelError
from edgezo.options import DRAW, AdapterPath, Device, EdgeDir, RunDir, Seed, Step, Threads, TopK, TopP, step_of_run

if TYPE_CHECKING:
    from edgezo.runtime.model import EdgeModel

TRIES = 8  # draws before a prompt is given up
BETTER = {"1": "the better one", "2": "the better one", "0": "skip", "r": "two others", "q": "quit"}
GOOD = {"+": "good", "-": "bad", "0": "skip", "r": "another", "q": "quit"}
ROW_FIELDS = ("prompt", "chosen", "rejected")


class Ratings:
    """A .jsonl file of preference rows, one line appended for each rating.

    Args:
        path: a new file, or one to continue.

    Attributes:
        prompts: those with a row.
        written: rows added here.
        rows: rows in all.

    Raises:
        DataError: it has another suffix, or lines that are no preference rows.
    """

    def __init__(self, path: Path) -> None:
        from edgezo.runtime.data import read_rows
        from edgezo.runtime.tasks import text_of

        if path.suffix.lower() != ".jsonl":
            raise DataError(f"{path}: ratings are rows of a .jsonl file; give it that suffix")
        if not path.parent.is_dir():
            raise DataError(f"{path}: no folder {path.parent}; make it first")
        found = read_rows(path) if path.exists() and (path.is_dir() or path.stat().st_size) else []
        self.path, self.written, self.rows = path, 0, len(found)
        texts = [[text_of(row, name) for name in ROW_FIELDS] for row in found]
        self.prompts = {prompt for prompt, _, _ in texts}

    def add(self, prompt: str, chosen: str, rejected: str) -> None:
        """Append a row; it is on the disk when this returns."""
        line = json.dumps(dict(zip(ROW_FIELDS, (prompt, chosen, rejected), strict=True)), ensure_ascii=False) + "\n"
        with open(self.path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        self.prompts.add(prompt)
        self.written, self.rows = self.written + 1, self.rows + 1


class Answers:
    """Sampled answers, each with a seed of its own.

    Args:
        model: the edge model, at the weights to rate.
        max_tokens: tokens of an answer at most.
        sampling: how to draw; its seed is that of the first answer.
    """

    def __init__(self, model: "EdgeModel", max_tokens: int, sampling: Sampling) -> None:
        self.model, self.max_tokens, self.sampling = model, max_tokens, sampling
        self.drawn, self.warned = 0, False

    def draw(self, prompt: str, count: int, but: set[str]) -> list[str]:
        """So many different answers that are none of `but`; fewer when the model has no more to say. None is blank: nothing could be learned."""
        found: list[str] = []
        for _ in range(TRIES):
            text = self._draw(prompt)
            if text.strip() and text not in but and text not in found:
                found.append(text)
            if len(found) == count:
                break
        self._warn(prompt, found)
        return found

    def _draw(self, prompt: str) -> str:
        from edgezo.runtime.generate import generate

        sampling = self.sampling._replace(seed=self.sampling.seed + self.drawn)
        self.drawn += 1
        return "".join(generate(self.model, prompt, self.max_tokens, sampling))

    def _warn(self, prompt: str, texts: list[str]) -> None:
        """Tuning puts a space between a prompt and an answer without any (runtime/examples.py)."""
        if not self.warned and not prompt[-1:].isspace() and any(not text[0].isspace() for text in texts):
            self.warned = True
            notice("an answer follows its prompt without a space, tuning will put one there; a prompt that ends in one avoids it")


def rate_command(
    directory: EdgeDir,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The .jsonl file of ratings to make or continue.")],
    run: RunDir = None,
    step: Step = None,
    adapter: AdapterPath = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="Prompts: rows with a field prompt, or a text file with one a line; else they are typed."),
    ] = None,
    one: Annotated[bool, typer.Option("--one", help="Show one answer at a time, for + or -; a pair of both makes a row.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the model's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens of an answer at most.")] = ANSWER_TOKENS,
    temperature: Annotated[float, typer.Option("--temperature", help="Of the sampling.")] = 0.8,
    top_k: TopK = DRAW.top_k,
    top_p: TopP = DRAW.top_p,
    seed: Seed = DRAW.seed,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Rate generated answers: the better of two, or thumbs up and down. Rows are for `edgezo tune`. From a pipe, lines are read."""
    from edgezo.runtime.model import EdgeModel
    from edgezo.runtime.sampling import check_sampling

    sampling = Sampling(temperature, top_k, top_p, seed)
    check_sampling(sampling)
    given = read_prompts(prompts) if prompts is not None else None
    ratings = Ratings(output)
    model = EdgeModel(directory, threads=threads, device=device, run=run, step=step_of_run(step, run), adapter=adapter)
    if chat and model.manifest.tokenizer.chat_template is None:
        raise EdgeModelError(f"{directory}: has no chat template; leave --chat out")
    answers = Answers(model, max_tokens, sampling)
    try:
        for typed in typed_prompts() if given is None else given:
            try:
                rate_prompt(answers, ratings, typed, chat_prompt(model, typed) if chat else typed, one, given is not None)
            except DataError as error:  # of this prompt, as one that fills the context
                terminal.stderr().print(f"error: {error}")
    except EOFError:
        pass
    sys.stdout.write(f"{summary(ratings, directory)}\n")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, each once.

    Raises:
        DataError: it is missing or has none, a row has no prompt, or it is not UTF-8.
    """
    from edgezo.runtime.data import read_rows
    from edgezo.runtime.tasks import text_of

    if not path.is_file():
        raise DataError(f"{path}: no such file of prompts; give rows with a field prompt, or a text file with one a line")
    if path.suffix.lower() in ROW_SUFFIXES:
        return list(dict.fromkeys(text_of(row, "prompt") for row in read_rows(path)))
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    found = list(dict.fromkeys(line for line in lines if line.strip()))
    if not found:
        raise DataError(f"{path}: no prompts in it; write one a line")
    return found


def typed_prompts() -> Iterator[str]:
    """Prompts as they are typed, until q or the end of the input."""
    while True:
        line = asked("prompt (q quit)")
        if line.strip() == "q":
            raise EOFError
        if line.strip():
            yield line


def chat_prompt(model: "EdgeModel", typed: str) -> str:
    """A prompt in the chat template, without the beginning-of-text token where the tokenizer puts one there itself."""
    rendered, facts = model.text.chat([{"role": "user", "content": typed}], reply=True), model.manifest.tokenizer
    twice = facts.bos_token_id is not None and model.text.encode(rendered)[:2] == [facts.bos_token_id] * 2
    return rendered.removeprefix(facts.special_tokens.get("bos_token", "")) if twice else rendered


def rate_prompt(answers: Answers, ratings: Ratings, typed: str, prompt: str, one: bool, told: bool) -> None:
    """Show answers to a prompt until one is better than another or it is skipped.

    Args:
        typed: the prompt as the person knows it; `prompt` is what is generated from and kept.
        one: a single answer at a time.
        told: show the prompt too.

    Raises:
        EOFError: the person is done.
        DataError: the prompt fills the context.
    """
    if prompt in ratings.prompts:
        notice(f"rated already, skipped: {typed}")
        return
    if told:
        show("prompt", typed)
    pair = judge(answers, prompt) if one else compare(answers, prompt)
    if pair is not None:
        ratings.add(prompt, *pair)


def compare(answers: Answers, prompt: str) -> tuple[str, str] | None:
    """The better and the worse of two answers; None when the prompt is skipped."""
    seen: set[str] = set()
    while True:
        pair = answers.draw(prompt, 2, seen)
        if len(pair) < 2:
            notice(f"no two different answers in {TRIES} tries, skipped; --temperature or --max-tokens may be raised")
            return None
        for name, text in zip("12", pair, strict=True):
            show(name, text)
        key = choice(BETTER)
        if key != "r":
            return {"1": (pair[0], pair[1]), "2": (pair[1], pair[0])}.get(key)


def judge(answers: Answers, prompt: str) -> tuple[str, str] | None:
    """A good and a bad answer, shown one by one; None when the prompt is skipped."""
    rated: dict[str, str] = {}
    seen: set[str] = set()
    while len(rated) < 2:
        texts = answers.draw(prompt, 1, seen)
        if not texts:
            notice(f"no other answer in {TRIES} tries, skipped; --temperature or --max-tokens may be raised")
            return None
        show("answer", texts[0])
        key = choice(GOOD)
        if key == "0":
            return None
        seen.add(texts[0])
        if key != "r":
            rated[key] = texts[0]
    return rated["+"], rated["-"]


def choice(keys: dict[str, str]) -> str:
    """One of the keys, asked for until it is given.

    Raises:
        EOFError: it is q, or the input ends.
    """
    meanings = dict.fromkeys(keys.values())
    shown = ", ".join(f"{' or '.join(key for key in keys if keys[key] == meaning)} {meaning}" for meaning in meanings)
    while (key := asked(shown).strip().lower()) not in keys:
        notice(f"{key!r}: give {shown}")
    if key == "q":
        raise EOFError
    return key


def asked(question: str) -> str:
    """The next line of standard input; the question is shown on a terminal alone."""
    line = read_line(f"{question}> " if sys.stdin.isatty() and sys.stdout.isatty() else "")
    if line is None:
        raise EOFError
    return line


def show(name: str, text: str) -> None:
    """A text after its name, further lines below its first."""
    lines = itertools.chain([name], itertools.repeat(" " * len(name)))
    sys.stdout.write("".join(f"{head}  {line}\n" for head, line in zip(lines, text.strip().splitlines() or [""], strict=False)))
    sys.stdout.flush()


def summary(ratings: Ratings, directory: Path) -> str:
    """How many rows were written, and what to do with them."""
    count = f"{ratings.written} row{'' if ratings.written == 1 else 's'} written to {ratings.path}"
    if not ratings.rows:
        return f"0 rows written, {ratings.path} has none"
    return f"{count}, which has {ratings.rows}; tune on them: edgezo tune {directory} --data {ratings.path} -o RUN"
