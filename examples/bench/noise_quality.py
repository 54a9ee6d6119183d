"""Does learning notice that noise comes from a shared table? Same rows, same steps, fresh bits against table windows.

    python -m examples.bench.noise_quality EDGE --steps 100 --seeds 3

Both sides use the notes of examples/notes, full-parameter tuning, and differ in nothing but z.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from edgezo.config import make_config
from edgezo.demo import SETTINGS, TEMPLATE, TOPICS
from edgezo.runtime import noise
from edgezo.runtime import run as run_module
from edgezo.runtime import tune as tune_module
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.noise import Direction, Floats
from edgezo.runtime.weights import MutableWeights

NOTES = Path(__file__).parents[1] / "notes"
FRESH = 9  # key word of a stream that nothing else draws from


class FreshBits(MutableWeights):
    """One independent sign an element, every step."""

    def flush(self) -> None:
        pending, self._pending = self._pending, {}
        for tensor in self.tensors:
            for direction, scales in pending.items():
                table = self._table(direction, scales, tensor.quantum)
                plus, minus = table[np.argmax(noise.table("rademacher") > 0)], table[np.argmax(noise.table("rademacher") < 0)]
                tensor.flat += np.where(fresh_signs(direction, tensor.id, tensor.flat.size), plus, minus)


def fresh_signs(direction: Direction, tensor: int, size: int) -> np.ndarray:
    """bool [size] from the raw stream of a domain of its own."""
    drawn = noise.words(direction.seed, FRESH, -(-size // 64), tensor=tensor, step=direction.step)
    return np.unpackbits(drawn.view(np.uint8), count=size).astype(bool)


def measure(edge: Path, kind: type[MutableWeights], seed: int, steps: int) -> dict[str, float]:
    """Validation loss and accuracy after a run."""

    def make(model: EdgeModel, config: tune_module.TuneConfig) -> MutableWeights:
        tunable: dict[str, Floats] = model.tunable
        return kind(tunable, eps=config.eps, distribution="rademacher", threads=model.threads)

    tune_module.mutable_weights = run_module.mutable_weights = make
    settings = {
        **SETTINGS,
        "steps": steps,
        "seed": seed,
        "eval_every": steps,
        "template": TEMPLATE,
        "labels": ",".join(f"{t}={t}" for t in TOPICS),
    }
    config = make_config(None, {**settings, "data": str(NOTES / "train.jsonl"), "valid": str(NOTES / "validation.jsonl")})
    with TemporaryDirectory() as folder:
        result = tune_module.tune(EdgeModel(edge), config, Path(folder) / "run")
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [line["valid"] for line in lines if "valid" in line][-1]
    train = [line["loss"] for line in lines if "loss" in line][-steps // 4 :]
    return {"steps": result.steps, "loss": last["loss"], "accuracy": last["accuracy"], "last_quarter_train_loss": float(np.mean(train))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("edge", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    for seed in range(arguments.seeds):
        for kind in (MutableWeights, FreshBits):
            name = "table" if kind is MutableWeights else "fresh"
            print(json.dumps({"noise": name, "seed": seed, **measure(arguments.edge, kind, seed, arguments.steps)}), flush=True)


if __name__ == "__main__":
    main()
