"""The export command, and what it tells of the edge model it made."""

from typing import TYPE_CHECKING, Annotated

import typer

from edgezo import terminal
from edgezo.config import ALL_LINEAR, PREFIX_TOKENS
from edgezo.options import Json, Output

if TYPE_CHECKING:
    from pathlib import Path

    from edgezo.export import ExportResult

POOLED: dict[str | None, str] = {None: "", "mean": " on the mean of the token states", "cls": " on the first token's state"}


def export_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id, Hugging Face folder, .gguf file, or folder with an optimum model.onnx.")
    ],
    output: Output,
    tunable: Annotated[
        str, typer.Option("--tunable", help="all, or a regular expression over weight names: 'norm', 'self_attn', 'layers\\.2[0-9]\\.'.")
    ] = "all",
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter",
            show_default=False,
            help="Freeze the base and tune an adapter: lora or prefix; or, in place, norms or the weights of a regular expression. [default: no adapter, all weights are tuned]",
        ),
    ] = None,
    targets: Annotated[
        str, typer.Option("--targets", help="Linear layers of lora: all-linear, names as q_proj,v_proj, or a regular expression.")
    ] = ALL_LINEAR,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Length of the prefix.")] = PREFIX_TOKENS,
    weights: Annotated[
        str,
        typer.Option(
            "--weights",
            help="How frozen weights are stored: fp32, int8 or int4 (weights only, activations stay fp32); or fp16, for --device cuda.",
        ),
    ] = "fp32",
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes",
            show_default=False,
            help="Classify with a head on an encoder: how many classes, or their names as negative,positive; a new head where the model has none.",
        ),
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(
            "--pooling",
            show_default=False,
            help="What a new head reads: mean or cls, of the last token states, or the encoder's pooler. [default: as 1_Pooling/config.json of the model says, else its architecture's own head]",
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Hub revision.")] = None,
    as_json: Json = False,
) -> None:
    """Export a model to an edge model, checked against its source (needs edgezo[export])."""
    from edgezo.api import export_model

    with terminal.stages() as progress:
        result = export_model(
            model,
            output,
            tunable=tunable,
            adapter=adapter,
            targets=targets,
            tokens=tokens,
            weights=weights,
            classes=classes,
            pooling=pooling,
            revision=revision,
            progress=progress,
        )
    if not as_json:
        terminal.print_rows(export_rows(output, result))
        return
    manifest = result.manifest
    terminal.print_json(
        {
            "directory": str(output),
            "bytes": sum(file.bytes for file in manifest.files.values()),
            "tunable_parameters": manifest.tunable_size,
            "adapter": manifest.adapter.kind if manifest.adapter else None,
            "weights": manifest.weights,
            "family": manifest.origin.family,
            "classes": manifest.classes,
            "new_weights": manifest.new_weights,
            "pooling": manifest.pooling,
            "export_seconds": round(result.export_seconds, 1),
            **result.verification.model_dump(),
        }
    )


def export_rows(output: "Path", result: "ExportResult") -> list[tuple[str, str]]:
    """What was made, how it compares with its source, and what to do with it."""
    manifest, checked = result.manifest, result.verification
    size = sum(file.bytes for file in manifest.files.values())
    tuned = f"{manifest.tunable_size:,} tunable parameters in {len(manifest.tunable)} tensors"
    if manifest.adapter is not None and manifest.adapter.kind == "lora":
        tuned = f"frozen, {manifest.weights}, with LoRA branch points at {len(manifest.adapter.targets)} linear layers"
    rows = [("edge model", f"{output}, {size / 1e6:,.0f} MB, {tuned}")]
    if manifest.classes:
        rows.append(("classes", ", ".join(manifest.classes)))
    if manifest.new_weights:
        head = f"{', '.join(manifest.new_weights)}{POOLED[manifest.pooling]}"
        rows.append(("new head", f"{head}; small and random, it knows nothing before tuning"))
    equal = f"largest log-probability difference {checked.largest_log_prob_difference:.1e}"
    if checked.greedy_tokens_equal is not None:
        equal += f", {checked.greedy_tokens_equal} greedy tokens equal"
    if checked.quantization_loss_change is not None:
        equal += f"; rounding weights to {manifest.weights} changed the loss by {checked.quantization_loss_change:+.4f} nats a token"
    if checked.half_log_prob_difference is not None:
        equal += f", products in fp16 change log-probabilities by up to {checked.half_log_prob_difference:.1e}"
    return [
        *rows,
        ("checked", equal),
        ("took", f"{result.export_seconds:.0f} s"),
        ("next", f"edgezo tune {output} --data train.jsonl -o run    (labelled rows: with --template and --labels, or --task)"),
    ]
