"""`edgezo export`: source, graphs, weight files, tokenizer, manifest, check; the directory appears whole or not at all."""

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import cast, get_args

import numpy as np
import onnx

from edgezo.adapters import Adapter
from edgezo.config import ALL_LINEAR, PREFIX_TOKENS
from edgezo.errors import ConfigError, ExportError
from edgezo.export.adapters import check_targets, find_targets
from edgezo.export.attention_probe import attention_outputs
from edgezo.export.encoder import check_pooling, parse_classes
from edgezo.export.freeze import freeze
from edgezo.export.graphs import attach_weights, generation_graph, scoring_graph, unconnected
from edgezo.export.prefix import check_tokens, fill_prefix, prefix_weight
from edgezo.export.source import Source, load_source, save_tokenizer
from edgezo.export.verify import probe_logits, verify
from edgezo.export.weights import matching, plan_tensors, refuse_non_finite, tunable_pattern, write_weights
from edgezo.manifest import FAMILY_WORDS, Manifest, StoredFile, TokenizerFacts, Verification
from edgezo.quantization import Precision
from edgezo.storage import directory_in_the_making, refuse_existing, sha256_file

CONFIG_FILE = "config.json"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class ExportResult:
    """What an export made: the directory, its manifest, how it compares with its source, and the seconds it took."""

    directory: Path
    manifest: Manifest
    verification: Verification
    export_seconds: float


def export_model(
    model: str,
    output: str | Path,
    *,
    tunable: str = "all",
    adapter: str | None = None,
    targets: str = ALL_LINEAR,
    tokens: int = PREFIX_TOKENS,
    weights: str = "fp32",
    classes: str | None = None,
    pooling: str | None = None,
    revision: str | None = None,
    progress: Progress = lambda stage: None,
) -> ExportResult:
    """Export a causal or masked language model, or an encoder classifier, to an edge model directory and check it against its source.

    Args:
        model: hub id, Hugging Face folder, .gguf file, or folder with an optimum-style model.onnx.
        output: directory to make; it must not exist.
        tunable: "all", "norms", or a regular expression over Hugging Face weight names; without `adapter`.
        adapter: "lora" or "prefix" freezes the base and prepares the graphs; anything else is the same as `tunable`.
        targets: of LoRA: "all-linear", names as "q_proj,v_proj", or a regular expression over module names.
        tokens: of a prefix.
        weights: how frozen linear weights and the token embedding are stored.
        classes: how many classes, or their names, of a new head on an encoder; or other names for those of its own head.
        pooling: what a new head reads: "mean" or "cls" of the last token states, or the architecture's "pooler"; None: as the source's
            1_Pooling/config.json says, else the architecture's own head.
        revision: hub revision.
        progress: called with the name of each stage as it begins.

    Raises:
        ExportError: the model cannot be exported, or differs from its source (with the weights as rounded) by more than 2e-3 in a
            log-probability or in one of 16 greedy tokens. Nothing is left at `output` then.
        ConfigError: `tunable` or `targets` matches nothing; settings that exclude each other.
    """
    started = time.monotonic()
    output = Path(output)
    refuse_existing(output, ExportError, "choose another directory or remove it")
    precision = _check_settings(tunable, adapter, targets, tokens, weights)
    names = parse_classes(classes)
    check_pooling(pooling, names)
    option = "--tunable"
    if adapter not in {None, "lora", "prefix"}:
        option, tunable, adapter = "--adapter (neither lora nor prefix, so weights in place)", str(adapter), None
    progress(f"loading and tracing {Path(model).name if Path(model).exists() else model}")
    source = load_source(model, revision, names, pooling)
    decoder = source.decoder
    if source.new_weights:
        progress(f"making a new head of {len(source.classes)} classes: {', '.join(source.new_weights)}")
    if adapter == "prefix" and decoder.family != "causal":
        raise ConfigError(
            f"--adapter prefix: a prefix is put before the text of a causal model, {model} is {FAMILY_WORDS[decoder.family]}; use --adapter lora"
        )
    refuse_non_finite(decoder.weights.values())
    origin = source.origin.model_copy(update={"weights_sha256": _weights_sha256(source)})
    chosen = set() if adapter is not None else matching(decoder.weights.values(), tunable, option)
    unquantized = None
    if precision != "fp32":
        if not source.shares_weights:
            raise ExportError(f"{model}: a model.onnx cannot be rounded and checked here; give the Hugging Face folder it was made from")
        unquantized = probe_logits(source)
        progress(f"rounding weights to {weights}")
    freeze(decoder, [name for name in list(decoder.weights) if name not in chosen], precision)
    described = None
    if adapter == "lora":
        described = Adapter(kind="lora", targets=find_targets(decoder, targets))
    elif adapter == "prefix":
        check_tokens(tokens, source)
        described = Adapter(kind="prefix", tokens=tokens)
    try:
        with directory_in_the_making(output) as folder:
            progress("building the graphs")
            probes = attention_outputs(decoder)
            scoring_model, scoring = scoring_graph(decoder, described, probes)
            graphs = [(scoring_model, scoring)]
            if decoder.family == "causal":
                graphs.append(generation_graph(decoder, described, probes))
            generation = graphs[1][1] if len(graphs) > 1 else None
            tensors = plan_tensors(decoder.weights.values(), chosen)
            dead = unconnected(scoring_model, [tensor.name for tensor in tensors if tensor.tunable])
            if dead:
                raise ExportError(
                    f"{model}: {len(dead)} tunable weights do not reach the scores: {', '.join(dead[:3])}; leave them out with --tunable"
                )
            for proto, graph in graphs:
                attach_weights(proto, tensors, decoder.parts)
                onnx.save(proto, folder / graph.file)
            progress(f"writing {sum(tensor.nbytes for tensor in tensors) / 1e6:,.0f} MB of weights")
            files = write_weights(folder, tensors, decoder.weights)
            if adapter == "prefix" and generation is not None:
                prefix = prefix_weight(decoder, tokens)
                fill_prefix(prefix, folder / generation.file, source, generation.inputs)
                (planned,) = plan_tensors([prefix], {prefix.name})
                files |= write_weights(folder, [planned], {prefix.name: prefix})
                tensors.append(planned)
            template, special = save_tokenizer(source, folder)
            (folder / CONFIG_FILE).write_text(source.config.to_json_string(use_diff=False), encoding="utf-8")
            progress("checking against the source")
            checked = verify(folder, scoring, generation, source, unquantized)
            for name in sorted(path.name for path in folder.iterdir()):
                if name not in files:
                    files[name] = StoredFile(bytes=(folder / name).stat().st_size, sha256=sha256_file(folder / name))
            manifest = Manifest(
                edgezo=version("edgezo"),
                origin=origin,
                tokenizer=_tokenizer_facts(source, template, special),
                scoring=scoring,
                generation=generation,
                tensors=tensors,
                weights=precision,
                adapter=described,
                config=CONFIG_FILE,
                classes=source.classes,
                new_weights=source.new_weights,
                pooling=source.pooling,
                head=decoder.head,
                probes=probes,
                verification=checked,
                files=files,
            )
            manifest.write(folder)
    except OSError as error:
        raise ExportError(
            f"{output}: cannot be written ({error.strerror or error}); nothing was kept, free space or choose another directory"
        ) from error
    return ExportResult(output, manifest, checked, time.monotonic() - started)


def _check_settings(tunable: str, adapter: str | None, targets: str, tokens: int, weights: str) -> Precision:
    """Mistakes that can be told before the minutes of loading; returns the precision of the weights."""
    near = get_close_matches(str(adapter), ("lora", "prefix", "norms"), cutoff=0.7)
    if near and adapter not in near:
        raise ConfigError(f"--adapter {adapter}: is neither lora nor prefix nor norms; did you mean {near[0]}?")
    if weights not in get_args(Precision):
        raise ConfigError(
            f"--weights {weights}: fp32, fp16, int8 or int4; integers are of weights alone, since int8 activations round away the difference of losses that tuning measures"
        )
    if adapter is not None and tunable != "all":
        raise ConfigError(f"--adapter {adapter} freezes the whole base, --tunable {tunable} tunes some of it; give one of the two")
    if adapter != "lora" and targets != ALL_LINEAR:
        raise ConfigError(f"--targets {targets}: says where LoRA goes; add --adapter lora or leave it out")
    if adapter != "prefix" and tokens != PREFIX_TOKENS:
        raise ConfigError(f"--tokens {tokens}: says how long a prefix is; add --adapter prefix or leave it out")
    if weights != "fp32" and adapter in {None, "all"} and tunable == "all":
        raise ConfigError(f"--weights {weights}: rounded weights cannot be tuned; add --adapter lora, or leave --weights out")
    check_targets(targets)
    if adapter in {None, "lora", "prefix"}:
        tunable_pattern(tunable)
    else:
        tunable_pattern(str(adapter), "--adapter")
    return cast(Precision, weights)


def _weights_sha256(source: Source) -> str:
    """Identity of the source's weights, whatever they are stored as: SHA-256 over names and float32 values as [out, in], and the pooling."""
    digest = hashlib.sha256((source.pooling or "").encode())  # heads that read otherwise have the same weights
    for name in sorted(source.decoder.weights):
        weight = source.decoder.weights[name]
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(weight.array.T if weight.transposed else weight.array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _tokenizer_facts(source: Source, template: str | None, special: dict[str, str]) -> TokenizerFacts:
    tokenizer = source.tokenizer
    vocabulary = source.origin.vocab_size

    def known(tokens: Iterable[int | None]) -> list[int]:
        """The embedding may have no row for a token that was added to the tokenizer alone."""
        return list(dict.fromkeys(token for token in tokens if token is not None and token < vocabulary))

    eos = known([tokenizer.eos_token_id, *source.generation_eos])
    bos = known([tokenizer.bos_token_id])
    mask = known([tokenizer.mask_token_id]) if source.origin.family == "masked" else []
    return TokenizerFacts(
        file="tokenizer.json",
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=eos,
        pad_token_id=known([tokenizer.pad_token_id, *eos, 0])[0],
        mask_token_id=mask[0] if mask else None,
        special_tokens=special,
        chat_template=template,
    )
