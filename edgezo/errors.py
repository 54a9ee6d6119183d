"""The exceptions edgezo raises for what a user can cause or mend.

    EdgezoError                one clear line; the command line prints it and exits with 1
    ├── ConfigError            an option or configuration file that cannot be used
    ├── DataError              a data file, row, template or label that cannot be used
    ├── EdgeModelError         an edge model directory that cannot be trusted or read
    ├── ExportError            a model that cannot be exported, or whose export differs from its source
    ├── RunError               a run directory that cannot be read, resumed or written
    ├── AdapterError           an adapter file that cannot be read, or does not fit the edge model
    ├── DeadTensorError        a tunable tensor whose change the engine does not see
    ├── DivergenceError        a run whose loss keeps rising, whatever its step size; it stands at its last good step
    └── NonFiniteLossError     a loss that is NaN or infinite; the weights are as before the step

Every message says what was asked, what was found, and what to do.
"""

import difflib
from collections.abc import Iterable


class EdgezoError(Exception):
    """Base of all expected failures."""

    def __str__(self) -> str:
        """One line whatever names and values it tells: control characters and halves of surrogate pairs are escaped."""
        text = super().__str__()
        return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class ConfigError(EdgezoError):
    """An option or configuration file cannot be used."""


class DataError(EdgezoError):
    """A data file, row, template or label cannot be used."""


class EdgeModelError(EdgezoError):
    """An edge model directory cannot be trusted or read."""


class ExportError(EdgezoError):
    """A model cannot be exported, or its export differs from its source."""


class RunError(EdgezoError):
    """A run directory cannot be read, resumed or written."""


class AdapterError(EdgezoError):
    """An adapter file cannot be read, or does not fit the edge model."""


class DeadTensorError(EdgezoError):
    """The engine does not see a change of a tunable tensor."""


class DivergenceError(EdgezoError):
    """A run's loss rose too often; the steps that made it rise were taken back."""


class NonFiniteLossError(EdgezoError):
    """The loss was NaN or infinite; the weights were put back before raising."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line of at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean 'steps'?)' where a name is misspelt; nothing where none of the known ones is near."""
    names = {one.lower(): one for one in known}
    found = difflib.get_close_matches(name.strip().lower(), names, 1, cutoff=0.75)  # at 0.6 'resume' is near 'rule'
    return f" (did you mean {names[found[0]]!r}?)" if found else ""
