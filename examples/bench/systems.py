"""edgezo against PyTorch on the same rows: seconds of a step, rows a second, peak memory.

    python -m examples.bench.systems MODEL [--work DIR] [--sizes 8x64,16x32] [--rounds 5] [--only NAME,NAME] [--plot FILE] [--json]

MODEL is what `edgezo export` takes. What is made of it (edge models, a Hugging Face folder) stays in --work and is used again. Every
system has a process of its own; they step in turns, so that a slow minute of the machine slows all of them; medians over rounds.
A size is rows x tokens of one forward: a two-sided step computes these rows twice. Stacked LoRA spends them on as many directions as rows.
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgezo.export import export_model
from edgezo.export.quiet import quiet
from edgezo.runtime.machine import default_threads
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.noise import Distribution
from edgezo.runtime.samplers.full import Full
from edgezo.runtime.scoring import Sequences
from edgezo.runtime.weights import MutableWeights
from examples.bench.adapter import make_rows, make_theta, stacked_step
from examples.bench.measure import Build, Measured, Step, in_turns
from examples.bench.step import EPS, make_feeds, make_step

EXPORTS: dict[str, dict[str, Any]] = {
    "full": {},
    "fp32": {"adapter": "lora"},
    "int8": {"adapter": "lora", "weights": "int8"},
    "int4": {"adapter": "lora", "weights": "int4"},
}


def bare_forwards(edge: str, threads: int, rows: int, tokens: int) -> Step:
    """Two forwards of the scoring graph: the floor of a two-sided step."""
    model = EdgeModel(edge, threads=threads)
    feeds = make_feeds(model, rows, tokens)
    return lambda number: [model.scoring.run(["log_probs"], feeds) for _ in range(2)]


def full(edge: str, threads: int, rows: int, tokens: int, distribution: Distribution = "rademacher") -> Step:
    """One direction in all weights, in place."""
    model = EdgeModel(edge, threads=threads)
    weights = MutableWeights(model.weights, eps=EPS, sampler=Full(distribution), threads=threads)
    return make_step(model, weights, make_feeds(model, rows, tokens))


def lora(edge: str, threads: int, rows: int, tokens: int) -> Step:
    """As many directions as rows, both signs in one forward."""
    theta = make_theta(Path(edge), rows, 1, threads, 2 * rows * tokens)
    examples = make_rows(theta.model, rows, tokens)
    return lambda number: stacked_step(theta, examples, number)


def lora_forwards(edge: str, threads: int, rows: int, tokens: int) -> Step:
    """Inference of as many rows as a step of stacked LoRA computes, on the same base, in one forward."""
    model = EdgeModel(edge, threads=threads)
    sequences, pairs = Sequences(model, 2 * rows * tokens), [pair for row in make_rows(model, 2 * rows, tokens) for pair in row.pairs]
    return lambda number: sequences.log_probs(pairs)


def torch_step(kind: str, *arguments: Any) -> Step:
    """A system of torch_systems, imported where it runs: edgezo's processes have no torch."""
    from examples.bench import torch_systems

    step: Step = getattr(torch_systems, kind)(*arguments)
    return step


def systems(work: Path, threads: int, rows: int, tokens: int) -> dict[str, Build]:
    """Every system by the name it has in the table."""
    edges = {name: str(work / f"edge-{name}") for name in EXPORTS}
    size = (threads, rows, tokens)
    torch = (str(work / "hf"), *size)
    made = {
        "edgezo: two bare forwards": Build(bare_forwards, (edges["full"], *size)),
        "edgezo full, Rademacher": Build(full, (edges["full"], *size, "rademacher")),
        "edgezo full, Gaussian": Build(full, (edges["full"], *size, "gaussian")),
    }
    for base in ("fp32", "int8", "int4"):
        made[f"edgezo: one bare forward, {base}"] = Build(lora_forwards, (edges[base], *size))
        made[f"edgezo LoRA stacked, {base}"] = Build(lora, (edges[base], *size))
    made |= {
        "PyTorch: two forwards": Build(torch_step, ("two_forwards", *torch)),
    }
    for name, lora_alone in (("full", False), ("LoRA", True)):
        made[f"PyTorch MeZO {name}, as published"] = Build(torch_step, ("mezo", *torch, lora_alone, 0))
        made[f"PyTorch MeZO {name}, last logits alone"] = Build(torch_step, ("mezo", *torch, lora_alone, 1))
    for name, tuned in (("full", False), ("LoRA", True)):
        made[f"PyTorch AdamW {name}"] = Build(torch_step, ("adamw", *torch, tuned, False))
        made[f"PyTorch AdamW {name}, checkpointing"] = Build(torch_step, ("adamw", *torch, tuned, True))
    return made


def prepare(source: str, work: Path) -> None:
    """Make what the systems read, unless it is there."""
    work.mkdir(parents=True, exist_ok=True)
    for name, settings in EXPORTS.items():
        if not (work / f"edge-{name}").exists():
            print(f"exporting {name}", flush=True)
            export_model(source, work / f"edge-{name}", **settings)
    if not (work / "hf").exists():
        from transformers import AutoModelForCausalLM

        path = Path(source)
        with quiet(), tempfile.TemporaryDirectory(dir=work) as folder:
            place, keywords = (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (source, {})
            AutoModelForCausalLM.from_pretrained(place, **keywords).save_pretrained(Path(folder) / "hf")
            (Path(folder) / "hf").rename(work / "hf")


def table(measured: dict[str, Measured], rows: int, tokens: int) -> list[str]:
    """A Markdown table."""
    lines = [f"| {rows} x {tokens} | seconds a step | rows forward a second | peak MB |", "|---|---|---|---|"]
    for name, (seconds, peak) in measured.items():
        forwards = 1 if "AdamW" in name else 2  # of each row
        lines.append(f"| {name} | {seconds:.2f} | {forwards * rows / seconds:.1f} | {peak / 1e6:.0f} |")
    return lines


def plot(results: dict[tuple[int, int], dict[str, Measured]], file: Path) -> None:
    """Seconds and memory of every system, one panel a size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2 * len(results)), layout="constrained")
    for panels, ((rows, tokens), measured) in zip(figure.subplots(len(results), 2, squeeze=False), results.items(), strict=True):
        names = list(measured)[::-1]
        colors = ["tab:orange" if name.startswith("PyTorch") else "tab:blue" for name in names]
        for axes, values, label, digits in (
            (panels[0], [measured[name].seconds for name in names], f"seconds a step, {rows} x {tokens} tokens", 2),
            (panels[1], [measured[name].peak_bytes / 1e6 for name in names], "peak resident MB", 0),
        ):
            bars = axes.barh(names, values, color=colors)
            axes.bar_label(bars, labels=[f"{value:.{digits}f}" for value in values], padding=3, fontsize=8)
            axes.set_xlabel(label)
            axes.margins(x=0.15)
            axes.spines[["top", "right"]].set_visible(False)
        panels[1].set_yticklabels([])
    figure.savefig(file, dpi=120)


def machine() -> str:
    """What the figures hold for."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    return f"{default_threads()} threads, {processor}, onnxruntime {onnxruntime.__version__}, NumPy {np.__version__}, commit {commit or 'unknown'}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, default=Path("bench"))
    parser.add_argument("--sizes", default="8x64,16x32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="parts of names, with commas")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    prepare(given.model, given.work)
    results = {}
    for size in given.sizes.split(","):
        rows, tokens = (int(part) for part in size.split("x"))
        builds = systems(given.work, given.threads, rows, tokens)
        wanted = {name: build for name, build in builds.items() if not given.only or any(part in name for part in given.only.split(","))}
        results[rows, tokens] = in_turns(wanted, given.rounds)
        if not given.json:
            print("\n".join(table(results[rows, tokens], rows, tokens)), flush=True)
    print(machine() if not given.json else json.dumps(_as_json(results)))
    if given.plot:
        plot(results, given.plot)


def _as_json(results: dict[tuple[int, int], dict[str, Measured]]) -> dict[str, Any]:
    return {
        "machine": machine(),
        "sizes": {
            f"{rows}x{tokens}": {name: found._asdict() for name, found in measured.items()} for (rows, tokens), measured in results.items()
        },
    }


if __name__ == "__main__":
    main()
