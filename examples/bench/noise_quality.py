"""Does learning notice that noise comes from a shared table? Same rows, same steps, fresh bits against table windows.

    python -m examples.bench.noise_quality EDGE --steps 100 --seeds 3

Both sides use the notes of examples/notes, full-parameter tuning, and differ in nothing but z.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from edgezo.config import make_config
from edgezo.demo import TEMPLATE, TOPICS
from edgezo.runtime import noise
from edgezo.runtime import theta as theta_module
from edgezo.runtime import tune as tune_module
from edgezo.runtime.grid import Additions, GridTensor, sign_values
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.noise import Floats
from edgezo.runtime.passes import NumPyPasses
from edgezo.runtime.samplers.sampler import Sampler
from edgezo.runtime.weights import MutableWeights

NOTES = Path(__file__).parents[1] / "notes"
SETTINGS = {"lr": 4e-5, "eps": 1e-3, "batch": 8, "start": "none"}
FRESH = 9  # key word of a stream that nothing else draws from
CHUNK = 1 << 16


class FreshBits(NumPyPasses):
    """One independent sign an element, every step."""

    def add(self, tensors: Sequence[GridTensor], additions: Additions, sampler: Sampler) -> None:
        bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
        for tensor in tensors:
            for direction, scales in additions.items():
                plus, minus = sign_values(direction, scales, tensor.quantum)
                amounts = np.array([minus, plus], np.float32)
                drawn = noise.words(
                    direction.seed, FRESH, -(-tensor.size // 64), tensor=tensor.id, step=direction.step, direction=direction.number
                )
                _add_signs(self.flat[tensor.name], drawn.view(np.uint8), amounts[bits])


def _add_signs(flat: Floats, drawn: npt.NDArray[np.uint8], expansion: Floats) -> None:
    """flat += the eight amounts of every drawn byte, chunk by chunk."""
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK]
        part += expansion[drawn[start // 8 : start // 8 + CHUNK // 8]].reshape(-1)[: part.size]


def measure(edge: Path, kind: type[NumPyPasses], seed: int, steps: int) -> dict[str, float]:
    """Validation loss and accuracy after a run."""

    def make(model: EdgeModel, config: tune_module.TuneConfig, start: Path | None = None) -> MutableWeights:
        tunable: dict[str, Floats] = model.weights
        return MutableWeights(kind(tunable, model.threads), eps=config.eps)

    tune_module.mutable_weights = theta_module.mutable_weights = make
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
        for kind in (NumPyPasses, FreshBits):
            name = "table" if kind is NumPyPasses else "fresh"
            print(json.dumps({"noise": name, "seed": seed, **measure(arguments.edge, kind, seed, arguments.steps)}), flush=True)


if __name__ == "__main__":
    main()
