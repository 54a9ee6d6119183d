"""The check every export ends with: the edge model against its source, through plain onnxruntime."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from edgezo.errors import ExportError, first_line
from edgezo.export.half import LARGEST, keep_rounding
from edgezo.export.source import Source
from edgezo.manifest import Family, Graph, Verification

LOG_PROB_TOLERANCE = 2e-3
HALF_TOLERANCE = 0.05  # products rounded to float16 moved SmolLM2-135M by 0.011, tiny random models by 0.004 to 0.007
GREEDY_TOKENS = 16
PROBES = ("The quick brown fox jumps over the lazy dog, and then it", "Question: what is the capital of France? Answer:", "It was")


Logits = list[npt.NDArray[np.float32]]
Integers = npt.NDArray[np.int64]


class Probe(NamedTuple):
    """Token ids to run, int64 [tokens], and what is scored of them: pairs of a row of the logits and a target, int64 [pairs] both."""

    tokens: Integers
    positions: Integers
    targets: Integers


def probe_logits(source: Source) -> Logits:
    """The source's logits on the probes, float32 [tokens, vocabulary] each; of a classifier [1, classes]."""
    return [source.logits(probe.tokens[None])[0] for probe in _probes(source)]


def verify(directory: Path, scoring: Graph, generation: Graph | None, source: Source, unquantized: Logits | None = None) -> Verification:
    """Score and generate with the files in `directory` and compare with the source.

    Args:
        generation: None where there is no such graph.
        unquantized: `probe_logits` before the weights were quantised, to tell what that changed.

    Raises:
        ExportError: a log-probability differs by more than 2e-3, or one of 16 greedy tokens differs; with float16 weights also when
            products rounded to float16 give another one by more than HALF_TOLERANCE, or none that is finite.
    """
    probes = _probes(source)
    logits = probe_logits(source)
    own = [_log_probs(values, probe) for values, probe in zip(logits, probes, strict=True)]
    difference = _largest_difference(_score(_session(directory / scoring.file), scoring, probes, source.decoder.family), own)
    if not difference <= LOG_PROB_TOLERANCE:
        raise ExportError(
            f"{source.origin.id}: log-probabilities of the edge model differ from the source by up to {difference:.2e}, allowed are {LOG_PROB_TOLERANCE:.0e}; this architecture cannot be exported faithfully"
        )
    before = [_log_probs(values, probe) for values, probe in zip(unquantized, probes, strict=True)] if unquantized else own
    rounded = _rounded_difference(directory, scoring, source, probes, own) if source.decoder.in_half else None
    return Verification(
        largest_log_prob_difference=difference,
        greedy_tokens_equal=_equal_greedy_tokens(directory, generation, source, probes) if generation is not None else None,
        onnxruntime=onnxruntime.__version__,
        quantization_loss_change=_loss_change(before, own, source.decoder.family) if unquantized else None,
        half_log_prob_difference=rounded,
    )


def _rounded_difference(directory: Path, scoring: Graph, source: Source, probes: list[Probe], own: list[npt.NDArray[np.float64]]) -> float:
    """The largest difference when what is multiplied with float16 weights, and the products, are rounded to float16 too."""
    graph = keep_rounding(onnx.load(directory / scoring.file, load_external_data=False))
    path = directory / "rounded.onnx"  # beside the weights that it refers to
    onnx.save(graph, path)
    found = _score(_session(path, optimised=False), scoring, probes, source.decoder.family)
    path.unlink()
    difference = _largest_difference(found, own)
    if not np.isfinite(difference):
        raise ExportError(
            f"{source.origin.id}: in half precision its log-probabilities are not finite, activations exceed {LARGEST}; export with --weights int8, or leave --weights out"
        )
    if difference > HALF_TOLERANCE:
        raise ExportError(
            f"{source.origin.id}: in half precision log-probabilities differ from the source by up to {difference:.2e}, allowed are {HALF_TOLERANCE:g}; export with --weights int8, or leave --weights out"
        )
    return difference


def _loss_change(before: list[npt.NDArray[np.float64]], after: list[npt.NDArray[np.float64]], family: Family) -> float:
    """Nats a token of the probes; of a classifier nats a probe, at the class that was the likeliest."""
    if family == "classifier":
        return float(np.mean([old.max() - new[old.argmax()] for old, new in zip(before, after, strict=True)]))
    return float(np.concatenate(before).mean() - np.concatenate(after).mean())


def _probes(source: Source) -> list[Probe]:
    """Token sequences of unequal length, so that padding is checked too; every next token, every third masked token, or every class."""
    family = source.decoder.family
    limit = min(48, source.origin.context_length - GREEDY_TOKENS)
    probes = []
    for text in PROBES:
        tokens = [token for token in source.tokenizer(text)["input_ids"] if token < source.origin.vocab_size] or [0]
        ids = np.array((tokens * 2)[: max(2, limit)] if len(tokens) < 2 else tokens[: max(2, limit)], np.int64)
        if family == "causal":
            probes.append(Probe(ids, np.arange(len(ids) - 1), ids[1:]))
        elif family == "masked":
            places = np.arange(1, len(ids), 3)
            masked = ids.copy()
            masked[places] = source.tokenizer.mask_token_id
            probes.append(Probe(masked, places, ids[places]))
        else:
            classes = np.arange(len(source.classes))
            probes.append(Probe(ids, np.zeros_like(classes), classes))
    return probes


def _equal_greedy_tokens(directory: Path, generation: Graph, source: Source, probes: list[Probe]) -> int:
    longest = max((probe.tokens for probe in probes), key=len)
    expected, found = _greedy_source(source, longest), _greedy_edge(directory, generation, longest)
    if expected != found:
        equal = next(i for i, pair in enumerate(zip(expected, found, strict=True)) if pair[0] != pair[1])
        raise ExportError(
            f"{source.origin.id}: greedy generation differs from the source after {equal} of {GREEDY_TOKENS} tokens; this architecture cannot be exported faithfully"
        )
    return len(found)


def _session(path: Path, optimised: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # one warning per overridable initializer otherwise
    options.enable_mem_reuse = False  # its planning takes seconds for many nodes (runtime/session.py)
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(
            f"{path.name}: onnxruntime {onnxruntime.__version__} cannot load the exported graph: {first_line(error)}"
        ) from error


def _score(session: onnxruntime.InferenceSession, graph: Graph, probes: list[Probe], family: Family) -> list[npt.NDArray[np.float64]]:
    """Log-probability of every target of right-padded probes, through the scoring graph."""
    width = max(len(probe.tokens) for probe in probes)
    ids, mask = np.zeros((len(probes), width), np.int64), np.zeros((len(probes), width), np.int64)
    for row, (tokens, _, _) in enumerate(probes):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    stride = 1 if family == "classifier" else width
    rows = np.concatenate([row * stride + probe.positions for row, probe in enumerate(probes)])
    feeds = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": np.tile(np.arange(width, dtype=np.int64), (len(probes), 1)),
        "hidden_rows": rows,
        "pair_rows": np.arange(len(rows), dtype=np.int64),
        "pair_targets": np.concatenate([probe.targets for probe in probes]),
    }
    result = session.run(["log_probs"], {name: feeds[name] for name in graph.inputs})[0]
    return np.split(np.asarray(result, np.float64), np.cumsum([len(probe.targets) for probe in probes])[:-1])


def _log_probs(logits: npt.NDArray[np.float32], probe: Probe) -> npt.NDArray[np.float64]:
    wide = logits[probe.positions].astype(np.float64)
    top = wide.max(axis=-1, keepdims=True)
    lse = (top + np.log(np.exp(wide - top).sum(axis=-1, keepdims=True)))[:, 0]
    result: npt.NDArray[np.float64] = wide[np.arange(len(wide)), probe.targets] - lse
    return result


def _largest_difference(found: list[npt.NDArray[np.float64]], expected: list[npt.NDArray[np.float64]]) -> float:
    differences = np.concatenate([np.abs(a - b) for a, b in zip(found, expected, strict=True)])
    return float(differences.max())


def _greedy_source(source: Source, prompt: Integers) -> list[int]:
    tokens = prompt
    for _ in range(GREEDY_TOKENS):
        tokens = np.append(tokens, source.logits(tokens[None])[0, -1].argmax())
    return [int(token) for token in tokens[len(prompt) :]]


def _greedy_edge(directory: Path, graph: Graph, prompt: Integers) -> list[int]:
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
