"""Commands over runs: replay, verify, diff, merge."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from edgezo import terminal
from edgezo.errors import ConfigError, RunError
from edgezo.options import Device, EdgeDir, Json, Output, Step, Threads, step_choice
from edgezo.storage import sha256_file

if TYPE_CHECKING:
    from edgezo.manifest import Tuned

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory made by `edgezo tune`.")]


def replay_command(
    directory: EdgeDir,
    run: Run,
    output: Output,
    step: Step = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Write the tuned model of a run as an edge model of its own: base + journal, no forward pass."""
    from edgezo.runtime.tuned import write_tuned

    _written(output, [run], write_tuned(directory, [run], [1.0], step_choice(step), output, threads=threads), as_json)


def merge_command(
    directory: EdgeDir,
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories, all tuned from DIR.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Directory, or .onnx_adapter file, to make.")],
    to: Annotated[
        str,
        typer.Option(
            "--format", help="edge: an edge model; hf: a Hugging Face folder; peft: a PEFT folder; onnx-adapter: for onnxruntime."
        ),
    ] = "edge",
    weights: Annotated[
        str | None, typer.Option("--weights", show_default=False, help="Share of each run, as 0.5,0.5. [default: equal shares]")
    ] = None,
    step: Step = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Write what runs of one base have tuned, for elsewhere; of several runs the average."""
    from edgezo.runtime.tuned import Format, write_tuned

    if to not in get_args(Format):
        raise ConfigError(f"--format {to}: {', '.join(get_args(Format))} are the formats")
    try:
        shares = [1 / len(runs)] * len(runs) if weights is None else [float(part) for part in weights.split(",")]
    except ValueError:
        raise ConfigError(f"--weights {weights!r}: give one number a run, separated by commas") from None
    _written(output, runs, write_tuned(directory, runs, shares, step_choice(step), output, cast(Format, to), threads), as_json)


def verify_command(
    run: Run,
    base: Annotated[Path | None, typer.Option("--base", metavar="DIR", help="Its edge model: check that too.")] = None,
    every: Annotated[
        int | None, typer.Option("--every", metavar="K", min=1, help="Derive every K-th step again by its forward passes; needs --base.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", metavar="PATH", help="Where its training rows are now.")] = None,
    valid: Annotated[str | None, typer.Option("--valid", metavar="PATH", help="Where its validation rows are now.")] = None,
    threads: Threads = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Check a run: checksums of its journal, hashes of its data and base, and on request its scalars."""
    from edgezo.runtime.check import check_run
    from edgezo.runtime.data import where
    from edgezo.runtime.model import EdgeModel

    if every is not None and base is None:
        raise ConfigError(f"--every {every}: needs the weights; add --base DIR")
    with terminal.stages() as progress:
        model = EdgeModel(base, threads=threads, device=device) if base is not None else None
        if every is not None:
            progress("replaying, with forward passes on the way")
        found = check_run(run, model, every, data=data, valid=valid)
    facts: dict[str, Any] = {
        "run": str(run),
        "steps": found.steps,
        "evaluations": found.evaluations,
        "journal_sha256": found.journal_sha256,
        "torn_bytes": found.torn_bytes,
        "files": {file.setting: {"path": file.path, "state": file.state} for file in found.files}
        if as_json
        else [" ".join(file) for file in found.files],
        "base": "not checked" if base is None else f"{base}, as recorded",
    }
    if every is not None or as_json:
        facts |= {"steps_derived_again": found.derived, "largest_loss_difference": found.largest_loss_difference}
    left = [f"{file.path} (not {where(file.path)}; {file.mend})" for file in found.files if file.state == "not there"]
    left += ["the base (--base DIR)"] if base is None else [] if every else ["the scalars of steps (--every K)"]
    parts = [f"not checked: {', '.join(left)}"] if left else []
    parts += [f"{found.torn_bytes} torn bytes at the end, which a resume cuts off"] if found.torn_bytes else []
    facts["verdict"] = "; ".join(found.problems or ["no fault found", *parts])
    terminal.print_facts(facts, as_json)
    if found.problems:
        raise RunError(f"{run}: {'; '.join(found.problems)}")


def diff_command(
    first: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    second: Annotated[Path, typer.Argument(metavar="RUN", help="Another.")],
    as_json: Json = False,
) -> None:
    """Compare two runs: settings, files, results, and up to which step they are the same."""
    from edgezo.runtime.check import compare_runs
    from edgezo.runtime.run import read_run

    facts = {"runs": [str(first), str(second)], **compare_runs(read_run(first), read_run(second))}
    if not as_json:
        facts |= dict(zip(("best of the first", "best of the second"), facts.pop("best"), strict=True))
    if not as_json and facts["settings"]:
        facts |= {f"--{name.replace('_', '-')}": terminal.changed_text(name, *pair) for name, pair in facts.pop("settings").items()}
    terminal.print_facts(facts, as_json)


def _written(output: Path, runs: list[Path], tuned: "list[Tuned]", as_json: bool) -> None:
    from edgezo.manifest import MANIFEST_NAME, READING_VERSION
    from edgezo.manifest_reader import read_manifest
    from edgezo.runtime.run import read_run

    if not any(one.step for one in tuned) and not any(read_run(run).journal.heads for run in runs):
        terminal.stderr().print("note: step 0 is the start, nothing in it is tuned; --step last takes the last step")
    manifest = read_manifest(output) if (output / MANIFEST_NAME).is_file() else None  # of other formats there is none
    if manifest is not None and manifest.reading is None:
        older = "the base was exported by an older version, export it again to have it kept"
        why = "its runs read them differently" if manifest.version >= READING_VERSION else older
        ask = "give eval and predict their --template and --labels, or --task"
        terminal.stderr().print(f"note: {output} does not keep how rows are read: {why}; {ask}")
    facts: dict[str, Any] = {"written": str(output)}
    if as_json or [one.weight for one in tuned] != [1.0]:
        facts |= {"steps": [one.step for one in tuned], "shares": [one.weight for one in tuned]}
    else:
        facts["step"] = tuned[0].step or f"0, the {read_run(runs[0]).start_name}"
    files = [output] if output.is_file() else sorted(output.iterdir())
    facts["sha256"] = {path.name: sha256_file(path) for path in files if path.suffix in {".bin", ".safetensors", ".onnx_adapter"}}
    terminal.print_facts(facts, as_json)
