"""A run as its directory tells it: config.json, journal.bin, metrics.jsonl, summary.json."""

import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from filelock import FileLock, Timeout
from pydantic import ValidationError

from edgezo.config import TuneConfig, describe
from edgezo.errors import DataError, RunError
from edgezo.manifest import MANIFEST_NAME, Manifest
from edgezo.runtime import noise
from edgezo.runtime.corpus import sha256_data
from edgezo.runtime.data import where
from edgezo.runtime.evaluation import Evaluation
from edgezo.runtime.journal_reader import JournalContents, read_journal
from edgezo.runtime.journal_records import StepRecord
from edgezo.runtime.order import ORDER
from edgezo.storage import JOURNAL, is_run, sha256_file

# what the weights depend on, with the base, the start, the noise and the records
DECISIVE = (
    "seed", "eps", "noise", "weight_decay", "directions", "rule", "beta_m", "beta_v", "anchor_every", "sampler", "share", "z_rank",
    "redraw_every", "rank", "alpha", "tune_a", "hessian_smooth",
)  # fmt: skip
LOCK = ".lock"
METRICS_LINE_LIMIT = 1 << 16  # characters
MAY_CHANGE = {"data", "valid", "steps", "minutes", "eval_every", "patience"}  # on resume; data files are compared by their content
CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
BEFORE = {"valid_share": 0.0, "patience": 0}  # what held before there were these settings
INIT = "init.safetensors"  # the adapter a run started from, when it was given one
StepChoice = int | Literal["best", "last"]


class Run(NamedTuple):
    """A run directory as read; `config` has the settings that hold at the end of the journal."""

    directory: Path
    config: TuneConfig
    journal: JournalContents
    seconds: float
    opening_seconds: float  # of those, what the processes took before their first step
    forward_rows: int

    @property
    def header(self) -> dict[str, Any]:
        """The journal's header."""
        return self.journal.header

    @property
    def order_version(self) -> int:
        """Of the order in which steps see rows; weights do not depend on it.

        Raises:
            RunError: this edgezo does not know it.
        """
        version = self.header.get("order", 1)
        if version not in range(1, ORDER + 1):
            raise RunError(
                f"{self.directory}: its rows are in order {version!r}, this edgezo has 1 to {ORDER}; update edgezo to go on with it"
            )
        return int(version)

    @property
    def records(self) -> list[StepRecord]:
        """The scalars of every step."""
        return self.journal.records

    @property
    def start(self) -> Path | None:
        """The tensors the run started from, when they were given; checked against the journal.

        Raises:
            RunError: they are missing or were changed.
        """
        recorded = self.header.get("init")
        if recorded is None:
            return None
        path = self.directory / INIT
        if not path.is_file() or sha256_file(path) != recorded:
            raise RunError(f"{path}: missing or changed; the run started from this adapter and cannot be rebuilt, restore it from a copy")
        return path

    @property
    def start_name(self) -> str:
        """What step 0 is: the start, or an exact one that was kept."""
        return "exact start" if self.journal.untuned is not None or (self.journal.heads and self.header.get("init") is None) else "start"

    @property
    def evaluations(self) -> dict[int, Evaluation]:
        """Evaluations on the way, by step."""
        return self.journal.evaluations

    @property
    def best_step(self) -> int:
        """The step with the best validation; the last step when there was none."""
        return len(self.records) if self.journal.best_step is None else self.journal.best_step

    def resolve(self, step: StepChoice) -> int:
        """The number of a step given as number, 'best' or 'last'."""
        if step == "best":
            return self.best_step
        if step == "last":
            return len(self.records)
        if not 0 <= step <= len(self.records):
            raise RunError(f"{self.directory}: step {step} was asked for, the run has steps 0 to {len(self.records)}")
        return step


def base_id(manifest: Manifest) -> str:
    """Identity of what a run starts from: SHA-256 over every tensor's name, shape and place, the weight files' hashes, and the adapter."""
    parts: list[Any] = [[t.name, t.shape, t.file, t.offset, t.tunable, manifest.files[t.file].sha256] for t in manifest.tensors]
    if manifest.adapter is not None:
        parts.append(manifest.adapter.model_dump())
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def journal_header(manifest: Manifest, config: TuneConfig, start: Path | None = None) -> dict[str, Any]:
    """The header of a run's journal: what the run was made from.

    The weights depend on `base`, `init`, `noise`, the records, and of `config` on `DECISIVE`.

    Args:
        start: file of the tensors that the run starts from.
    """
    text = (manifest.tokenizer.file, manifest.tokenizer.chat_template)
    return {
        "base": base_id(manifest),
        "config": config.model_dump(),
        "data": sha256_data(config.data),
        "valid": sha256_data(config.valid) if config.valid else None,
        "tokenizer": hashlib.sha256("".join(manifest.files[name].sha256 for name in text if name).encode()).hexdigest(),
        "init": sha256_file(start) if start is not None else None,
        "noise": noise.SPECIFICATION_VERSION,
        "order": ORDER,
    }


def measured_lr(header: Mapping[str, Any]) -> float | None:
    """The learning rate that was measured before the run; None where none was, or a stranger wrote something else there."""
    facts = header.get("calibration")
    found = facts.get("lr") if isinstance(facts, dict) else None
    return found if isinstance(found, float) and math.isfinite(found) and found > 0 else None


def read_run(directory: str | os.PathLike[str]) -> Run:
    """Read a run directory.

    Raises:
        RunError: it is none, or its files cannot be used.
    """
    directory = Path(directory)
    if directory.is_file():
        raise RunError(f"{directory}: a file; give a run directory, as edgezo tune DIR --data FILE -o RUN makes it")
    if not is_run(directory):
        if (directory / MANIFEST_NAME).is_file():
            raise RunError(
                f"{directory}: an edge model, no run; give the run directory that edgezo tune {directory} --data FILE -o RUN made"
            )
        found = f"no run in it ({JOURNAL} is missing)" if directory.exists() else "no such run directory"
        raise RunError(f"{directory}: {found}; make one with: edgezo tune DIR --data FILE -o {directory}")
    contents = read_journal(directory / JOURNAL)
    header = contents.header
    if header.get("noise") != noise.SPECIFICATION_VERSION:
        raise RunError(f"{directory}: its noise is of specification {header.get('noise')!r}, this edgezo has {noise.SPECIFICATION_VERSION}")
    if strange := sorted(contents.settings.keys() - MAY_CHANGE):
        raise RunError(f"{directory / JOURNAL}: changes {', '.join(strange)} on the way, which no run may")
    try:
        written = header.get("config")
        started = TuneConfig.model_validate({**BEFORE, **written} if isinstance(written, dict) else written)
        config = TuneConfig.model_validate({**started.model_dump(), **contents.settings})
    except ValidationError as error:
        raise RunError(f"{directory}: {describe(error, JOURNAL)}") from None
    seconds, rows, openings = (_numbers(directory / METRICS, name) for name in ("seconds", "forward_rows", "opening_seconds"))
    return Run(directory, config, contents, max(seconds, default=0.0), sum(openings), int(max(rows, default=0)))


def is_held(directory: Path) -> bool:
    """Whether a process is tuning the run now; not where that cannot be known."""
    if not (directory / LOCK).is_file():
        return False
    try:
        with FileLock(directory / LOCK, blocking=False):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def refuse_moved(directory: str | os.PathLike[str], config: TuneConfig, settings: Collection[str] = ("data", "valid")) -> None:
    """Refuse to work on a run's data where these files are not found: moved, or recorded relative to another folder.

    Raises:
        DataError: which, and how to say where they are.
    """
    paths = {name: getattr(config, name) for name in ("data", "valid") if name in settings}
    missing = {name: path for name, path in paths.items() if path is not None and not Path(path).exists()}
    if missing:
        found = " and ".join(f"--{name} {path} (not {where(path)})" for name, path in missing.items())
        say = " ".join(f"--{name} PATH" for name in missing)
        raise DataError(
            f"{directory}: the run's data was not found: {found}; go to the folder it was last tuned in, or say where it is: {say}"
        )


def check_same(previous: Run, config: TuneConfig, header: dict[str, Any]) -> None:
    """Refuse to continue a run with other settings: it may get more steps or minutes; what its weights depend on must stay."""
    made = len(previous.records)
    if config.steps is not None and config.steps < made:
        raise RunError(
            f"{previous.directory}: has {made} steps, --steps {config.steps} asks for fewer; give more, or use --step {config.steps} with eval and generate"
        )
    files = (("data", config.data, "data"), ("valid", config.valid, "validation data"), ("tokenizer", "the edge model", "tokenizer"))
    for name, path, shown in files:
        found, recorded = header[name], previous.header.get(name)
        if name == "valid" and recorded is None and found is not None:
            raise RunError(f"{path}: the run was started without {shown}; leave it out or start a new run")
        if found != recorded:
            raise RunError(
                f"{path}: is not the {shown} the run was started with (SHA-256 {str(found)[:12]}, the run has {str(recorded)[:12]}); give the same or start a new run"
            )
    old, new = previous.config.model_dump(), config.model_dump()
    for name in old:
        if name not in MAY_CHANGE and old[name] != new[name]:
            raise RunError(
                f"{previous.directory}: --{name.replace('_', '-')} {new[name]!r} differs from the run's {old[name]!r}; a resumed run keeps it, start a new run to change it"
            )


def read_summary(directory: Path) -> dict[str, Any]:
    """How the run ended when it last did; nothing where that is not known or not readable."""
    try:
        found = json.loads((directory / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _numbers(path: Path, name: str) -> list[float]:
    """The values of this name in the lines of the metrics; torn lines are passed over."""
    numbers = []
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            while line := file.readline(METRICS_LINE_LIMIT):
                try:
                    found = float(json.loads(line)[name])
                except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                    continue
                numbers += [found] if math.isfinite(found) else []
    return numbers
