"""A run can be written out, averaged, verified and compared; faults lose nothing before the last whole step."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kills
import numpy as np
import pytest

import edgezo
from edgezo import cli
from edgezo.errors import ConfigError, RunError
from edgezo.manifest import Manifest
from edgezo.manifest_reader import read_manifest
from edgezo.runtime import passes as passes_module
from edgezo.runtime import replay as replay_module
from edgezo.runtime.check import check_run, compare_runs
from edgezo.runtime.journal import Journal
from edgezo.runtime.journal_reader import read_journal
from edgezo.runtime.journal_records import STEP_BYTES, StepRecord
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.run import read_run
from edgezo.runtime.tuned import write_tuned
from edgezo.storage import sha256_file

SETTINGS: dict[str, Any] = {"template": "{text} It was", "labels": "terrible,great", "batch": 4, "lr": 1e-3, "eval_every": 5, "threads": 1}
COMMAND = ["--template", "{text} It was", "--labels", "terrible,great", "--batch", "4", "--lr", "1e-3", "--threads", "1"]


@pytest.fixture
def run(exported_dir: Path, reviews: str, tmp_path: Path) -> Path:
    """A run of twelve steps with evaluations."""
    edgezo.tune(exported_dir, tmp_path / "run", data=reviews, valid=reviews, steps=12, **SETTINGS)
    return tmp_path / "run"


def rewritten(run: Path, change: Callable[[int, StepRecord], StepRecord]) -> None:
    """Write the journal again with other scalars and right checksums, as a forger would."""
    contents = read_journal(run / "journal.bin")
    (run / "journal.bin").unlink()
    with Journal.create(run / "journal.bin", contents.header) as journal:
        for step, record in enumerate(contents.records):
            journal.append(change(step, record))


# replay and merge


def write_replayed(directory: Path, run: Path, step: Any, output: Path, threads: int | None = None) -> Manifest:
    """The tuned model of one run as an edge model; returns its manifest."""
    tuned = write_tuned(directory, [run], [1.0], step, output, threads=threads)
    manifest = read_manifest(output)
    assert manifest.tuned[-1:] == tuned
    return manifest


@pytest.mark.parametrize("step", [0, 7, "best", "last"])
def test_a_replayed_model_is_the_tuned_one(exported_dir: Path, run: Path, tmp_path: Path, step: Any) -> None:
    manifest = write_replayed(exported_dir, run, step, tmp_path / "out")
    tuned, written = EdgeModel(exported_dir, run=run, step=step), EdgeModel(tmp_path / "out")
    for name, array in tuned.weights.items():
        assert np.array_equal(array, written.weights[name]), name
    assert [entry.step for entry in manifest.tuned] == [tuned.step]
    assert manifest.tuned[0].journal == sha256_file(run / "journal.bin")
    assert written.generate("the film", 4) == tuned.generate("the film", 4)


def test_a_replayed_model_is_a_base_of_its_own(exported_dir: Path, run: Path, reviews: str, tmp_path: Path) -> None:
    write_replayed(exported_dir, run, "last", tmp_path / "out")
    edgezo.tune(tmp_path / "out", tmp_path / "second", data=reviews, steps=2, **SETTINGS)
    write_replayed(tmp_path / "out", tmp_path / "second", "last", tmp_path / "twice")
    assert [entry.step for entry in read_manifest(tmp_path / "twice").tuned] == [12, 2]
    with pytest.raises(RunError, match="was tuned from another edge model"):
        write_replayed(tmp_path / "out", run, "last", tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(("threads", "blocks", "group"), [(2, 16, 8), (1, 1, 8), (2, 3, 1), (1, 16, 5)])
def test_replay_does_not_depend_on_threads_shares_and_groups(
    exported_dir: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, blocks: int, group: int
) -> None:
    expected = write_replayed(exported_dir, run, "last", tmp_path / "usual", 1).files["tunable.bin"].sha256
    monkeypatch.setattr(passes_module, "RUN_BLOCKS", blocks)
    monkeypatch.setattr(replay_module, "REPLAY_GROUP", group)
    shutil.copytree(exported_dir, tmp_path / "copy")
    shutil.move(run, tmp_path / "moved")
    assert (
        write_replayed(tmp_path / "copy", tmp_path / "moved", "last", tmp_path / "other", threads).files["tunable.bin"].sha256 == expected
    )


def test_an_average_is_the_weighted_sum_of_changes(exported_dir: Path, run: Path, reviews: str, tmp_path: Path) -> None:
    edgezo.tune(exported_dir, tmp_path / "second", data=reviews, steps=6, seed=1, **SETTINGS)
    tuned = write_tuned(exported_dir, [run, tmp_path / "second"], [0.75, 0.25], "last", tmp_path / "out")
    base, merged = EdgeModel(exported_dir), EdgeModel(tmp_path / "out")
    first, second = (EdgeModel(exported_dir, run=folder, step="last") for folder in (run, tmp_path / "second"))
    for name, array in merged.weights.items():
        expected = 0.75 * first.weights[name].astype(np.float64) + 0.25 * second.weights[name]
        assert np.abs(array - expected).max() <= 1e-7 * max(1, np.abs(expected).max())
        assert not np.array_equal(array, base.weights[name])
    assert [(entry.step, entry.weight) for entry in tuned] == [(12, 0.75), (6, 0.25)]
    assert merged.manifest.tuned == tuned


@pytest.mark.parametrize("weights", [[1.0], [0.5, float("nan")], []])
def test_an_average_needs_one_finite_number_a_run(exported_dir: Path, run: Path, tmp_path: Path, weights: list[float]) -> None:
    with pytest.raises(ConfigError, match=rf"^--weights: {len(weights)} numbers for 2 runs; give one finite number a run"):
        write_tuned(exported_dir, [run, run], weights, "last", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# verify and diff


def test_a_good_run_is_verified_to_the_last_scalar(exported_dir: Path, run: Path) -> None:
    found = check_run(run, EdgeModel(exported_dir, threads=1), every=1)
    assert (found.steps, found.evaluations, found.torn_bytes, found.derived, found.problems) == (12, 4, 0, 12, [])
    assert [(file.setting, file.state) for file in found.files] == [("data", "as recorded"), ("valid", "as recorded")]
    assert found.largest_loss_difference is not None
    assert found.largest_loss_difference < 1e-6


def test_forged_scalars_are_found(exported_dir: Path, run: Path) -> None:
    rewritten(run, lambda step, record: record._replace(projected_grads=(-record.projected_grads[0],)) if step == 6 else record)
    assert check_run(run, EdgeModel(exported_dir, threads=1)).problems == []
    (problem,) = check_run(run, EdgeModel(exported_dir, threads=1), every=3).problems
    assert problem.startswith("losses derived again differ by ")


def test_a_run_of_several_directions_is_verified_and_a_forged_one_is_found(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    edgezo.tune(exported_dir, tmp_path / "run", data=reviews, steps=5, directions=3, rule="normalized", **SETTINGS)
    found = check_run(tmp_path / "run", EdgeModel(exported_dir, threads=1), every=1)
    assert (found.derived, found.problems) == (5, [])
    rewritten(tmp_path / "run", lambda step, record: record._replace(projected_grads=record.projected_grads[::-1]) if step == 2 else record)
    (problem,) = check_run(tmp_path / "run", EdgeModel(exported_dir, threads=1), every=1).problems
    assert problem.startswith("losses derived again differ by ")


def wrong(path: str | Path, setting: str) -> str:
    """The problem of a file that is another one."""
    return f"{path} is not the file the run was made with, say where that is: --{setting} PATH"


def test_changed_data_are_found(run: Path, reviews: str) -> None:
    Path(reviews).write_text('{"text": "other", "label": 0}\n')
    assert check_run(run).problems == [wrong(reviews, "data"), wrong(reviews, "valid")]
    moved = Path(reviews).with_name("moved.jsonl")
    moved.write_text("")
    assert check_run(run, data=str(moved)).problems == [
        wrong(moved, "data"),
        wrong(reviews, "valid"),
    ]
    Path(reviews).unlink()
    assert check_run(run).files == [("data", reviews, "not there"), ("valid", reviews, "not there")]


def test_the_validation_file_in_place_of_the_training_file_is_found(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    other = tmp_path / "valid.jsonl"
    other.write_text('{"text": "other", "label": 0}\n')
    edgezo.tune(exported_dir, tmp_path / "run", data=reviews, steps=1, **{**SETTINGS, "valid": str(other)})
    assert check_run(tmp_path / "run").problems == []
    assert check_run(tmp_path / "run", data=str(other)).problems == [wrong(other, "data")]


def test_a_changed_journal_is_refused(run: Path) -> None:
    data = bytearray((run / "journal.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (run / "journal.bin").write_bytes(data)
    with pytest.raises(RunError, match=r"was changed \(checksum differs\)"):
        check_run(run)


def test_runs_are_compared(exported_dir: Path, run: Path, reviews: str, tmp_path: Path) -> None:
    edgezo.tune(exported_dir, tmp_path / "longer", data=reviews, steps=12, **SETTINGS)
    edgezo.tune(exported_dir, tmp_path / "longer", resume=True, steps=15, threads=1)
    found = compare_runs(read_run(run), read_run(tmp_path / "longer"))
    assert (found["steps"], found["equal_steps"], found["equal_weights_up_to_step"]) == ([12, 15], 12, 12)
    assert found["settings"] == {"valid": [reviews, None], "steps": [12, 15]}
    assert (found["same_base"], found["same_data"], found["same_valid"]) == (True, True, False)
    edgezo.tune(exported_dir, tmp_path / "other", data=reviews, steps=3, seed=1, **SETTINGS)
    found = compare_runs(read_run(run), read_run(tmp_path / "other"))
    assert (found["equal_steps"], found["equal_weights_up_to_step"]) == (0, None)


# the commands


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `edgezo ...`; returns exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["edgezo", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def test_replay_tells_what_it_wrote(command: Callable[..., Any], exported_dir: Path, run: Path, tmp_path: Path) -> None:
    code, out, err = command("replay", exported_dir, run, "--step", "7", "-o", tmp_path / "out")
    tunable, head = (sha256_file(tmp_path / "out" / name) for name in ("tunable.bin", "head.bin"))
    written = f"written  {tmp_path / 'out'}\nstep     7\nsha256   head.bin {head}, tunable.bin {tunable}\n"
    assert (code, out, err) == (0, written, "")
    code, out, err = command("replay", exported_dir, run, "-o", tmp_path / "out")
    assert (code, out, err) == (1, "", f"error: {tmp_path / 'out'}: exists already; choose another place or remove it\n")


def test_merge_of_one_run_is_its_replay(command: Callable[..., Any], exported_dir: Path, run: Path, tmp_path: Path) -> None:
    assert command("replay", exported_dir, run, "-o", tmp_path / "one")[0] == 0
    code, out, _ = command("merge", exported_dir, run, "-o", tmp_path / "two", "--json")
    assert (code, json.loads(out)["sha256"]) == (0, {name: sha256_file(tmp_path / "one" / name) for name in ("head.bin", "tunable.bin")})
    code, _, err = command("merge", exported_dir, run, run, "-o", tmp_path / "three", "--weights", "a,b")
    assert (code, err) == (1, "error: --weights 'a,b': give one number a run, separated by commas\n")


def test_verify_finds_that_the_end_of_a_journal_is_lost(command: Callable[..., Any], run: Path) -> None:
    made, whole = len(read_run(run).records), (run / "journal.bin").read_bytes()
    (run / "journal.bin").write_bytes(whole[:-40])
    left = len(read_run(run).records)
    assert left < made
    code, out, err = command("verify", run)
    expected = f"journal.bin ends after step {left} and summary.json tells of {made} steps: its end is lost, restore it from a copy, or go on from step {left} with --resume"
    assert (code, expected in out + err) == (1, True)
    (run / "summary.json").unlink()  # of a process that never ended well nothing is known
    assert command("verify", run)[0] == 0


def test_verify_shows_its_findings_and_fails_on_a_problem(command: Callable[..., Any], exported_dir: Path, run: Path, reviews: str) -> None:
    code, out, err = command("verify", run, "--base", exported_dir, "--every", 5, "--threads", 1)
    names = [line.split("  ")[0] for line in out.splitlines()]
    expected = [
        "run",
        "steps",
        "evaluations",
        "journal sha256",
        "torn bytes",
        "files",
        "base",
        "steps derived again",
        "largest loss difference",
        "verdict",
    ]
    assert (code, names) == (0, expected)
    assert "steps derived again      3\n" in out
    assert out.endswith("verdict                  no fault found\n")
    Path(reviews).rename(Path(reviews).with_name("moved.jsonl"))
    _, out, _ = command("verify", run)
    assert [line.split("  ")[0] for line in out.splitlines()] == [*expected[:7], "verdict"]
    missing = [f"{reviews} (not there; say where that is: --{name} PATH)" for name in ("data", "valid")]
    expected = f"no fault found; not checked: {', '.join(missing)}, the base (--base DIR)\n"
    assert out.endswith(expected)
    moved = str(Path(reviews).with_name("moved.jsonl"))
    found = check_run(run, EdgeModel(exported_dir, threads=1), every=5, data=moved, valid=moved)
    assert found.files == [("data", moved, "as recorded"), ("valid", moved, "as recorded")]
    assert (found.derived, found.problems) == (3, [])
    Path(reviews).write_text("{}\n")
    code, out, err = command("verify", run, "--json")
    assert (code, json.loads(out)["files"]) == (1, {name: {"path": reviews, "state": "changed"} for name in ("data", "valid")})
    assert err == f"error: {run}: {wrong(reviews, 'data')}; {wrong(reviews, 'valid')}\n"
    assert command("verify", run, "--base", exported_dir, "--every", 5)[2].endswith(err)
    code, _, err = command("verify", run, "--every", 5)
    assert (code, err) == (1, "error: --every 5: needs the weights; add --base DIR\n")


def test_diff_shows_names_and_values(command: Callable[..., Any], run: Path) -> None:
    code, out, _ = command("diff", run, run)
    assert code == 0
    assert "equal steps               12\n" in out
    assert "settings                  none\n" in out
    best = [re.fullmatch(rf"best of the {place} +(rows .*)", line) for place in ("first", "second") for line in out.splitlines()]
    assert len(shown := [found[1] for found in best if found]) == 2 and shown[0] == shown[1]


def test_diff_shows_a_line_for_every_setting(command: Callable[..., Any], exported_dir: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "longer")
    assert command("tune", exported_dir, "-o", tmp_path / "longer", "--resume", "--steps", "13")[0] == 0
    code, out, _ = command("diff", run, tmp_path / "longer")
    assert code == 0
    assert re.search(r"^--steps +12 -> 13$", out, re.MULTILINE)
    assert "\nsettings " not in out


# faults


def test_every_killed_process_goes_on_to_the_weights_of_the_run_never_killed(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    options = ["--data", reviews, "--valid", reviews, *COMMAND, "--steps", "60", "--eval-every", "10"]
    (tmp_path / "kills").mkdir()
    outcome = kills.kill_runs(exported_dir, options, 5, tmp_path / "kills")
    assert (outcome.kills, outcome.different) == (5, 0)
    assert outcome.runs >= 1


def limited(limit: str, exported_dir: Path, run: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`edgezo tune` in a process of its own that first runs `limit`."""
    code = f"import resource, signal, sys; {limit}; sys.argv[0] = 'edgezo'; from edgezo.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, "tune", str(exported_dir), "-o", str(run), *options], capture_output=True, text=True)


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_journal_that_may_not_grow_keeps_its_whole_steps(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    """A file size limit cuts a write in the middle of a record, as a full disk does."""
    options = ["--data", reviews, *COMMAND, "--steps", "9"]
    assert limited("pass", exported_dir, tmp_path / "whole", *options).returncode == 0
    size = (tmp_path / "whole" / "journal.bin").stat().st_size - 5 * STEP_BYTES + 7
    limit = f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
    found = limited(limit, exported_dir, tmp_path / "run", *options)
    assert found.returncode == 1
    expected = r"error: .*run: cannot be written \(.*\); whole steps so far are kept, go on with --resume when it can be written"
    assert re.fullmatch(expected, found.stderr.splitlines()[-1])
    contents = read_journal(tmp_path / "run" / "journal.bin")
    assert (len(contents.records), contents.torn_bytes) == (4, 7)
    assert limited("pass", exported_dir, tmp_path / "run", "--resume").returncode == 0
    weights = [kills.weights_sha256(exported_dir, tmp_path / name) for name in ("whole", "run")]
    assert weights[0] == weights[1]


def test_an_engine_without_memory_loses_nothing(exported_dir: Path, reviews: str, run: Path, tmp_path: Path) -> None:
    """A batch the engine cannot hold is one line; the run goes on where it was."""
    code = f"""
import resource, sys
import edgezo
from edgezo.runtime.tune import Reporter
def starve(report):
    if report.step == 14:
        used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), resource.RLIM_INFINITY))
        from edgezo.runtime import model
        global hog
        hog = []
        try:
            while True: hog.append(bytearray(1 << 14))
        except MemoryError: pass
try:
    edgezo.tune({str(exported_dir)!r}, {str(run)!r}, resume=True, steps=20, threads=1, reporter=Reporter(step=starve))
except (edgezo.EdgezoError, MemoryError) as error:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    hog.clear()
    print(type(error).__name__)
    sys.exit(1)
"""
    if not Path("/proc/self/statm").is_file():
        pytest.skip("needs /proc and address space limits")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode != 0, found.stdout  # 1, or the engine's own abort: either way the journal is whole
    assert 14 <= len(read_run(run).records) < 20
    edgezo.tune(exported_dir, run, resume=True, threads=1)
    edgezo.tune(exported_dir, tmp_path / "whole", data=reviews, valid=reviews, steps=12, **SETTINGS)
    edgezo.tune(exported_dir, tmp_path / "whole", resume=True, steps=20, threads=1)
    assert kills.weights_sha256(exported_dir, run) == kills.weights_sha256(exported_dir, tmp_path / "whole")


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_full_disk_loses_nothing_before_the_last_whole_step(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with open(disk / "filler", "wb", buffering=0) as file:
            file.write(bytes(16 << 10))
        options = ["--data", reviews, *COMMAND, "--steps", "3000"]
        found = limited("pass", exported_dir, disk / "run", *options)
        assert found.returncode == 1
        assert "whole steps so far are kept, go on with --resume" in found.stderr
        made = len(read_run(disk / "run").records)
        assert made > 10
        (disk / "filler").unlink()
        edgezo.tune(exported_dir, disk / "run", resume=True, steps=made + 5, threads=1)
        assert len(read_run(disk / "run").records) == made + 5
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_clock_that_jumps_changes_nothing(
    exported_dir: Path, reviews: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time spent is measured by the monotonic clock alone."""
    jumps = iter(range(10**9, 0, -(10**6)))
    monkeypatch.setattr(time, "time", lambda: float(next(jumps)))
    monkeypatch.setattr(time, "time_ns", lambda: next(jumps) * 10**9)
    edgezo.tune(exported_dir, tmp_path / "again", data=reviews, valid=reviews, steps=12, **SETTINGS)
    assert read_run(tmp_path / "again").records == read_run(run).records
    assert 0 <= read_run(tmp_path / "again").seconds < 3600
