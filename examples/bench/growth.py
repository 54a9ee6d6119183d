"""How the time of a step grows with rows, tokens and parameters: random Llamas, a full-parameter step and a stacked LoRA step.

    python -m examples.bench.growth [--work DIR] [--rounds 3] [--most 500] [--plot FILE] [--json]

One variable at a time around 8 rows x 64 tokens and 132 million parameters. Medians over rounds; the two bare forwards of the same rows
are interleaved with the steps. Models are made once and stay in --work. --most leaves larger models out.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgezo.export import export_model
from edgezo.export.quiet import quiet
from edgezo.runtime.machine import default_threads
from examples.bench.measure import Build, in_turns
from examples.bench.systems import bare_forwards, full, lora, machine

VOCABULARY = 8192
SHAPES = {5: (192, 8), 19: (384, 9), 59: (640, 11), 132: (896, 13), 248: (1152, 15), 494: (1536, 17)}  # millions: width, layers
MIDDLE, ROWS, TOKENS = 132, 8, 64
KINDS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"adapter": "lora"}}
SYSTEMS: dict[str, tuple[Callable[..., Any], str]] = {
    "two bare forwards": (bare_forwards, "full"),
    "full": (full, "full"),
    "LoRA stacked": (lora, "lora"),
}


def make_models(work: Path, most: int) -> None:
    """Random Llamas with a tied embedding, head size 64, and a tokenizer of as many words, exported."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0"))
    for millions, (width, layers) in SHAPES.items():
        missing = {name: settings for name, settings in KINDS.items() if not (work / f"{millions}-{name}").exists()}
        if millions > max(most, MIDDLE) or not missing:
            continue
        torch.manual_seed(0)
        heads = width // 64
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=heads, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as source, quiet():
            LlamaForCausalLM(config).save_pretrained(source)
            PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w1", pad_token="w1").save_pretrained(source)
            for name, settings in missing.items():
                export_model(source, work / f"{millions}-{name}", **settings)
        print(f"made {millions} million parameters", flush=True)


def points(most: int) -> dict[str, list[tuple[int, int, int]]]:
    """(millions, rows, tokens) along each axis."""
    return {
        "rows": [(MIDDLE, rows, TOKENS) for rows in (1, 2, 4, 8, 16, 32, 64)],
        "tokens": [(MIDDLE, ROWS, tokens) for tokens in (32, 64, 128, 256, 512)],
        "million parameters": [(millions, ROWS, TOKENS) for millions in SHAPES if millions <= most],
    }


def measure(work: Path, point: tuple[int, int, int], rounds: int) -> dict[str, float]:
    """Median seconds of every system at one point."""
    millions, rows, tokens = point
    builds = {
        name: Build(make, (str(work / f"{millions}-{kind}"), default_threads(), rows, tokens)) for name, (make, kind) in SYSTEMS.items()
    }
    return {name: found.seconds for name, found in in_turns(builds, rounds).items()}


def plot(found: dict[str, list[tuple[float, dict[str, float]]]], file: Path) -> None:
    """One panel an axis, both scales logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    for panel, (axis, rows) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        for name, marker in zip(SYSTEMS, "o^s", strict=True):
            panel.loglog([value for value, _ in rows], [seconds[name] for _, seconds in rows], marker=marker, label=name, markersize=5)
        panel.set_xticks([value for value, _ in rows], [f"{value:g}" for value, _ in rows])
        panel.minorticks_off()
        panel.set_xlabel(axis)
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("seconds")
    figure.axes[0].legend(frameon=False)
    figure.savefig(file, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("bench"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=int, default=max(SHAPES))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    make_models(given.work, given.most)
    found: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for place, (axis, chosen) in enumerate(points(given.most).items()):
        coordinate = (1, 2, 0)[place]
        found[axis] = []
        for point in chosen:
            seconds = measure(given.work, point, given.rounds)
            found[axis].append((point[coordinate], seconds))
            if not given.json:
                print(f"{axis} {point[coordinate]}: " + ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items()), flush=True)
    print(json.dumps({"machine": machine(), "seconds": found}) if given.json else machine())
    if given.plot:
        plot(found, given.plot)


if __name__ == "__main__":
    main()
