"""Bare forwards of edge models and of onnxruntime-genai's own graphs of the same model, interleaved in one process.

    pip install --target SITE onnxruntime-genai onnx-ir 'transformers>=5'     # a folder of its own: optimum-onnx needs an older transformers
    PYTHONPATH=SITE python -m onnxruntime_genai.models.builder -m HF -o ALL -p fp32 -e cpu -c CACHE
    PYTHONPATH=SITE python -m onnxruntime_genai.models.builder -m HF -o LAST -p fp32 -e cpu -c CACHE --extra_options prune_lm_head=true
    python -m examples.bench.genai EDGE EDGE... --genai ALL LAST [--sizes 8x64,16x32] [--rounds 11] [--threads 2]

HF is a Hugging Face folder of the edge models' source. ALL gives the logits of every token, LAST those of the last. All sessions have the options of
edgezo/runtime/session.py. Medians of wall and CPU seconds and of their ratios to the first edge model, and the largest difference of log-probabilities from
it. On a machine with other work compare CPU seconds, with --threads 1: with more, waiting threads spin.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

from edgezo.runtime.model import Array, EdgeModel
from edgezo.runtime.session import session_options
from examples.bench.step import make_feeds


def edge_forward(model: EdgeModel, feeds: dict[str, Array]) -> Callable[[], Array]:
    """Log-probabilities of two label words a row."""
    return lambda: model.scoring.run(["log_probs"], {name: feeds[name] for name in model.manifest.scoring.inputs})[0]


def genai_forward(folder: Path, session: onnxruntime.InferenceSession, feeds: dict[str, Array]) -> Callable[[], Array]:
    """Logits without a past, as the graph gives them."""
    decoder = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    past = np.empty((len(feeds["input_ids"]), decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)
    given = {value.name: feeds.get(value.name, past) for value in session.get_inputs()}
    return lambda: session.run(["logits"], given)[0]


def log_probs(found: Array, feeds: dict[str, Array]) -> Array:
    """Of the pairs in `feeds`, from logits [rows, tokens or 1, vocabulary]; an edge model gives them itself."""
    if found.ndim == 1:
        return found
    last = found[:, -1].astype(np.float64)
    return np.asarray((last - np.logaddexp.reduce(last, axis=-1, keepdims=True))[feeds["pair_rows"], feeds["pair_targets"]])


def costs_of(forward: Callable[[], Array]) -> tuple[float, float]:
    """Wall time and CPU time of a call, in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    forward()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("edges", type=Path, nargs="+")
    parser.add_argument("--genai", type=Path, nargs="+", required=True)
    parser.add_argument("--sizes", default="8x64,16x32")
    for name, value in (("--rounds", 11), ("--threads", 2)):
        parser.add_argument(name, type=int, default=value)
    given = parser.parse_args()
    models = {path: EdgeModel(path, threads=given.threads) for path in given.edges}
    options, providers = session_options(given.threads), ["CPUExecutionProvider"]
    graphs = {path: onnxruntime.InferenceSession(str(path / "model.onnx"), options, providers=providers) for path in given.genai}
    print("size", "folder", "wall s", "CPU s", "wall/first", "CPU/first", "difference", sep="\t")
    for size in given.sizes.split(","):
        feeds = make_feeds(models[given.edges[0]], *map(int, size.split("x")))
        forwards = {path: edge_forward(model, feeds) for path, model in models.items()}
        forwards.update({path: genai_forward(path, session, feeds) for path, session in graphs.items()})
        scores = [log_probs(forward(), feeds) for forward in forwards.values()]
        rounds = np.array([[costs_of(forward) for forward in forwards.values()] for _ in range(given.rounds)])
        figures = np.concatenate([np.median(rounds, axis=0), np.median(rounds / rounds[:, :1], axis=0)], axis=1)
        for path, values, own in zip(forwards, figures, scores, strict=True):
            print(size, path, *(f"{value:.3f}" for value in values), f"{np.abs(own - scores[0]).max():.1e}", sep="\t", flush=True)


if __name__ == "__main__":
    main()
