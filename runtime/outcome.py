"""What a user's own objective sees of a row, and how it is found and called.

`--objective package.module:function` names a function that takes a list of `Outcome` and returns a list of as many numbers, larger is better:

    def short_and_right(outcomes):
        return [(outcome.text == outcome.fields["answer"]) - 0.01 * len(outcome.text) for outcome in outcomes]

Rows with candidates are scored, all others are answered by greedy generation, never with nothing. Tuning lowers minus the mean of the numbers. What the
function prints goes to standard error.
"""

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edgezo.errors import ConfigError, first_line

LARGEST = 1e30  # differences of means over an eps of 1e-8 are numbers of float32


class Outcome(NamedTuple):
    """What the model did with one row.

    fields: of the row, as read from the data.
    text: the generated answer; None where the row has candidates.
    scores: of every candidate, in nats: summed log-probability of a label word, mean of a choice; None without candidates.
    gold: index of the right candidate; None without candidates.
    """

    fields: Mapping[str, Any]
    text: str | None
    scores: Sequence[float] | None
    gold: int | None


Reward = Callable[[Sequence[Outcome]], Sequence[float]]


def load_reward(name: str) -> Reward:
    """Import a user's function; the working directory is searched first.

    Args:
        name: package.module:function.

    Raises:
        ConfigError: there is no such module or function, or the import fails.
    """
    module, _, function = name.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:  # and it stays, since the function may import on its own
        sys.path.insert(0, folder)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = importlib.import_module(module)
    except Exception as error:  # a user's module may raise anything
        raise ConfigError(f"--objective {name}: {module} cannot be imported from {folder}: {first_line(error)}") from error
    reward = getattr(found, function, None)
    if not callable(reward):
        raise ConfigError(f"--objective {name}: {module} has no function {function!r}")
    return _checked(name, reward)


def _checked(name: str, reward: Callable[[Sequence[Outcome]], Any]) -> Reward:
    def call(outcomes: Sequence[Outcome]) -> list[float]:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # standard output is for results, --json
                returned = reward(list(outcomes))
                if isinstance(returned, Iterator):  # and may fail only now
                    returned = list(returned)
        except Exception as error:
            raise ConfigError(
                f"--objective {name}: failed at {_place(error)} on a list of {len(outcomes)}: {type(error).__name__}: {first_line(error)} (text is None for rows with candidates, scores for all others)"
            ) from error
        try:
            values = [float(value) for value in returned]
        except Exception:  # of whatever class the values are
            raise ConfigError(f"--objective {name}: returned {_short(returned)}; return a list of numbers, one a row") from None
        if len(values) != len(outcomes):
            raise ConfigError(f"--objective {name}: returned {len(values)} values for {len(outcomes)} rows; return a number a row")
        strange = [value for value in values if not abs(value) <= LARGEST]  # NaN, too
        if strange:
            raise ConfigError(f"--objective {name}: returned {strange[0]:g}; return finite numbers from {-LARGEST:g} to {LARGEST:g}")
        return values

    return call


def _short(value: Any) -> str:
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 60 else f"{shown[:60]}..."


def _place(error: Exception) -> str:
    """File and line where a user's function failed."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"
