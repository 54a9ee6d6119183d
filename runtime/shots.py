"""Worked rows before every prompt: learning in context, the baseline that changes no weight.

    shot 1 \\n\\n shot 2 \\n\\n ... prompt        shot = filled prompt and its right candidate or answer

References:
    Brown et al. 2020, Language Models are Few-Shot Learners (arXiv 2005.14165).
    Min et al. 2022, MetaICL: Learning to Learn In Context (arXiv 2110.15943).
"""

import sys
from collections.abc import Sequence
from typing import cast

from edgezo.errors import ConfigError, DataError
from edgezo.manifest import FAMILY_WORDS
from edgezo.runtime import noise
from edgezo.runtime.data import Row
from edgezo.runtime.examples import gold_of, make_candidates, worked_text
from edgezo.runtime.scoring import Pair
from edgezo.runtime.tasks import Task
from edgezo.runtime.text import TextCodec

BETWEEN = "\n\n"
SHOWN_KINDS = {"classification", "choice", "answer", "completion"}


def add_shots(task: Task, rows: Sequence[Row], train: Sequence[str], text: TextCodec, max_length: int, room: int = 0) -> tuple[Task, int]:
    """The task with as many shots before its prompts as the longest of `rows` leaves space for, and their number.

    Shots are left out from the front, whole. Where nothing else ends an answer, a blank line does, as between shots.

    Args:
        task: without shots.
        rows: to evaluate on.
        train: texts of the shots, as `draw_shots` gives them.
        max_length: tokens of a row with its shots.
        room: tokens kept free after a prompt, for a generated answer.
    """
    longest = max(rows, key=lambda row: _length(row, task, text, room))
    ending = BETWEEN if task.stop is None and task.kind in {"answer", "completion"} else task.stop
    for first in range(len(train)):
        shown = task._replace(prefix="".join(shot + BETWEEN for shot in train[first:]), stop=ending)
        if all(_length(row, shown, text, room) <= max_length for row in (longest, *rows)):
            return shown, len(train) - first
    return task, 0


def draw_shots(rows: Sequence[Row], task: Task, count: int, seed: int) -> list[str]:
    """The texts of `count` rows, drawn with the seed; of a classification as many of each label as can be.

    Raises:
        ConfigError: the task has no prompts with a right answer, or there are fewer rows.
        DataError: a row lacks a field or has a label of its own.
    """
    if task.kind not in SHOWN_KINDS:
        raise DataError(
            f"--shots: puts worked rows before a prompt, and rows of kind {task.kind} have no prompt and right answer; leave it out"
        )
    if task.family != "causal":
        raise ConfigError(f"--shots: worked rows are read before a prompt, this is {FAMILY_WORDS[task.family]}; leave it out")
    if not 1 <= count <= len(rows):
        raise ConfigError(f"--shots {count}: {rows[0].place.rpartition(':')[0]} has {len(rows)} rows; give a number from 1 to {len(rows)}")
    order = [int(row) for row in noise.permutation(seed, len(rows), 0)]
    if task.kind == "classification":
        order = _in_turn(order, [gold_of(row, task) for row in rows])
    return [worked_text(rows[row], task) for row in order[:count]]


def _in_turn(order: Sequence[int], labels: Sequence[int]) -> list[int]:
    """The same rows in rounds, of each label the next one, in the given order within a round."""
    rounds: list[list[int]] = []
    seen = dict.fromkeys(labels, 0)
    for row in order:
        if seen[labels[row]] == len(rounds):
            rounds.append([])
        rounds[seen[labels[row]]].append(row)
        seen[labels[row]] += 1
    return [row for turn in rounds for row in turn]


def _length(row: Row, task: Task, text: TextCodec, room: int) -> int:
    """Tokens of a row that nothing is cut from."""
    pairs = cast("list[Pair]", make_candidates(row, task, text, sys.maxsize)[0])  # a causal model's
    return max(len(prompt) for prompt, _ in pairs) + max(room, *(len(completion) for _, completion in pairs))
