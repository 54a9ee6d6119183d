"""`edgezo export`: source, graphs, weight files, tokenizer, manifest, check; the directory appears whole or not at all."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import onnx

from edgezo.errors import ExportError
from edgezo.export.graphs import attach_weights, generation_graph, scoring_graph, unconnected
from edgezo.export.source import Source, load_source, save_tokenizer
from edgezo.export.verify import verify
from edgezo.export.weights import plan_tensors, tunable_pattern, write_weights
from edgezo.manifest import Manifest, StoredFile, TokenizerFacts, Verification
from edgezo.storage import directory_in_the_making, refuse_existing, sha256_file

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ExportResult:
    """What an export made: the directory, its manifest, how it compares with its source, and the seconds it took."""

    directory: Path
    manifest: Manifest
    verification: Verification
    export_seconds: float


def export_model(
    model: str, output: str | Path, *, tunable: str = "all", revision: str | None = None, progress: Progress = lambda stage: None
) -> ExportResult:
    """Export a decoder-only causal language model to an edge model directory and check it against its source.

    Args:
        model: hub id, Hugging Face folder, .gguf file, or folder with an optimum-style model.onnx.
        output: directory to make; it must not exist.
        tunable: "all" or a regular expression over Hugging Face weight names.
        revision: hub revision.
        progress: called with the name of each stage as it begins.

    Raises:
        ExportError: the model cannot be exported, or differs from its source by more than 2e-3 in a log-probability or in one of 16
            greedy tokens. Nothing is left at `output` then.
        ConfigError: `tunable` matches nothing.
    """
    started = time.monotonic()
    output = Path(output)
    refuse_existing(output, ExportError, "choose another directory or remove it")
    tunable_pattern(tunable)  # a mistake in it is told before the minutes of loading
    progress(f"loading and tracing {Path(model).name if Path(model).exists() else model}")
    source = load_source(model, revision)
    tensors = plan_tensors(source.decoder.weights.values(), tunable)
    try:
        with directory_in_the_making(output) as folder:
            progress("building the graphs")
            (scoring_model, scoring), (generation_model, generation) = scoring_graph(source.decoder), generation_graph(source.decoder)
            dead = unconnected(scoring_model, [tensor.name for tensor in tensors if tensor.tunable])
            if dead:
                raise ExportError(
                    f"{model}: {len(dead)} tunable weights do not reach the scores: {', '.join(dead[:3])}; leave them out with --tunable"
                )
            for proto, graph in ((scoring_model, scoring), (generation_model, generation)):
                attach_weights(proto, tensors)
                onnx.save(proto, folder / graph.file)
            progress(f"writing {sum(tensor.nbytes for tensor in tensors) / 1e6:,.0f} MB of weights")
            files = write_weights(folder, tensors, source.decoder.weights)
            template, special = save_tokenizer(source, folder)
            progress("checking against the source")
            checked = verify(folder, scoring, generation, source)
            for name in sorted(path.name for path in folder.iterdir()):
                if name not in files:
                    files[name] = StoredFile(bytes=(folder / name).stat().st_size, sha256=sha256_file(folder / name))
            manifest = Manifest(
                edgezo=version("edgezo"),
                origin=source.origin,
                tokenizer=_tokenizer_facts(source, template, special),
                scoring=scoring,
                generation=generation,
                tensors=tensors,
                verification=checked,
                files=files,
            )
            manifest.write(folder)
    except OSError as error:
        raise ExportError(
            f"{output}: cannot be written ({error.strerror or error}); nothing was kept, free space or choose another directory"
        ) from error
    return ExportResult(output, manifest, checked, time.monotonic() - started)


def _tokenizer_facts(source: Source, template: str | None, special: dict[str, str]) -> TokenizerFacts:
    tokenizer = source.tokenizer
    vocabulary = source.origin.vocab_size

    def known(tokens: Iterable[int | None]) -> list[int]:
        """The embedding may have no row for a token that was added to the tokenizer alone."""
        return list(dict.fromkeys(token for token in tokens if token is not None and token < vocabulary))

    eos = known([tokenizer.eos_token_id, *source.generation_eos])
    bos = known([tokenizer.bos_token_id])
    return TokenizerFacts(
        file="tokenizer.json",
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=eos,
        pad_token_id=known([tokenizer.pad_token_id, *eos, 0])[0],
        special_tokens=special,
        chat_template=template,
    )
