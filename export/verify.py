"""The check every export ends with: the edge model against its source, through plain onnxruntime."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from edgezo.errors import ExportError, first_line
from edgezo.export.source import Source
from edgezo.manifest import Graph, Verification

LOG_PROB_TOLERANCE = 2e-3
GREEDY_TOKENS = 16
PROBES = ("The quick brown fox jumps over the lazy dog, and then it", "Question: what is the capital of France? Answer:", "It was")


Logits = list[npt.NDArray[np.float32]]


def probe_logits(source: Source) -> Logits:
    """The source's logits on the probes, float32 [tokens, vocabulary] each."""
    return [source.logits(tokens[None])[0] for tokens in _probes(source)]


def verify(directory: Path, scoring: Graph, generation: Graph, source: Source, unquantized: Logits | None = None) -> Verification:
    """Score and generate with the files in `directory` and compare with the source.

    Args:
        unquantized: `probe_logits` before the weights were quantised, to tell what that changed.

    Raises:
        ExportError: a log-probability differs by more than 2e-3, or one of 16 greedy tokens differs.
    """
    probes = _probes(source)
    logits = probe_logits(source)
    difference = _largest_difference(
        _score(directory, scoring, probes), [_log_probs(own, tokens) for own, tokens in zip(logits, probes, strict=True)]
    )
    if not difference <= LOG_PROB_TOLERANCE:
        raise ExportError(
            f"{source.origin.id}: log-probabilities of the edge model differ from the source by up to {difference:.2e}, allowed are {LOG_PROB_TOLERANCE:.0e}; this architecture cannot be exported faithfully"
        )
    longest = max(probes, key=len)
    expected, found = _greedy_source(source, longest), _greedy_edge(directory, generation, longest)
    if expected != found:
        equal = next(i for i, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1])
        raise ExportError(
            f"{source.origin.id}: greedy generation differs from the source after {equal} of {GREEDY_TOKENS} tokens; this architecture cannot be exported faithfully"
        )
    own = [_log_probs(values, tokens) for values, tokens in zip(logits, probes, strict=True)]
    before = [_log_probs(values, tokens) for values, tokens in zip(unquantized, probes, strict=True)] if unquantized else own
    return Verification(
        largest_log_prob_difference=difference,
        greedy_tokens_equal=len(found),
        onnxruntime=onnxruntime.__version__,
        quantization_loss_change=float(np.concatenate(before).mean() - np.concatenate(own).mean()) if unquantized else None,
    )


def _probes(source: Source) -> list[npt.NDArray[np.int64]]:
    """Token sequences of unequal length, so that padding is checked too."""
    limit = min(48, source.origin.context_length - GREEDY_TOKENS)
    probes = []
    for text in PROBES:
        tokens = [token for token in source.tokenizer(text)["input_ids"] if token < source.origin.vocab_size] or [0]
        probes.append(np.array((tokens * 2)[: max(2, limit)] if len(tokens) < 2 else tokens[: max(2, limit)], np.int64))
    return probes


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # one warning per overridable initializer otherwise
    options.enable_mem_reuse = False  # its planning takes seconds for many nodes (runtime/session.py)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(
            f"{path.name}: onnxruntime {onnxruntime.__version__} cannot load the exported graph: {first_line(error)}"
        ) from error


def _score(directory: Path, graph: Graph, probes: list[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.float64]]:
    """Log-probability of every next token of right-padded probes, through the scoring graph."""
    session = _session(directory / graph.file)
    width = max(len(tokens) for tokens in probes)
    ids, mask = np.zeros((len(probes), width), np.int64), np.zeros((len(probes), width), np.int64)
    for row, tokens in enumerate(probes):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    rows = np.concatenate([row * width + np.arange(len(tokens) - 1, dtype=np.int64) for row, tokens in enumerate(probes)])
    feeds = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": np.tile(np.arange(width, dtype=np.int64), (len(probes), 1)),
        "hidden_rows": rows,
        "pair_rows": np.arange(len(rows), dtype=np.int64),
        "pair_targets": np.concatenate([tokens[1:] for tokens in probes]),
    }
    result = session.run(["log_probs"], {name: feeds[name] for name in graph.inputs})[0]
    return np.split(np.asarray(result, np.float64), np.cumsum([len(tokens) - 1 for tokens in probes])[:-1])


def _log_probs(logits: npt.NDArray[np.float32], tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    wide = logits[:-1].astype(np.float64)
    top = wide.max(axis=-1, keepdims=True)
    lse = (top + np.log(np.exp(wide - top).sum(axis=-1, keepdims=True)))[:, 0]
    result: npt.NDArray[np.float64] = wide[np.arange(len(tokens) - 1), tokens[1:]] - lse
    return result


def _largest_difference(found: list[npt.NDArray[np.float64]], expected: list[npt.NDArray[np.float64]]) -> float:
    differences = np.concatenate([np.abs(a - b) for a, b in zip(found, expected, strict=True)])
    return float(differences.max())


def _greedy_source(source: Source, prompt: npt.NDArray[np.int64]) -> list[int]:
    tokens = prompt
    for _ in range(GREEDY_TOKENS):
        tokens = np.append(tokens, source.logits(tokens[None])[0, -1].argmax())
    return [int(token) for token in tokens[len(prompt) :]]


def _greedy_edge(directory: Path, graph: Graph, prompt: npt.NDArray[np.int64]) -> list[int]:
    """Greedy tokens through the KV cache of the generation graph."""
    session = _session(directory / graph.file)
    past = {state.input: np.zeros((1, state.heads, 0, state.head_dim), np.float32) for state in graph.past}
    names = ["logits", *(state.output for state in graph.past)]
    new, seen, generated = prompt, 0, []
    for _ in range(GREEDY_TOKENS):
        feeds = {
            "input_ids": new[None],
            "attention_mask": np.ones((1, seen + len(new)), np.int64),
            "position_ids": np.arange(seen, seen + len(new), dtype=np.int64)[None],
            "hidden_rows": np.array([len(new) - 1], np.int64),
        }
        logits, *present = session.run(names, {**{name: feeds[name] for name in graph.inputs}, **past})
        generated.append(int(logits[0].argmax()))
        past = {state.input: value for state, value in zip(graph.past, present, strict=True)}
        seen, new = seen + len(new), np.array(generated[-1:], np.int64)
    return generated
