"""`edgezo inspect`: what a directory holds, as names and values."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgezo.adapters import HEAD_TOKENS, PREFIX
from edgezo.config import TuneConfig
from edgezo.errors import EdgezoError
from edgezo.manifest import MANIFEST_NAME
from edgezo.manifest_reader import read_manifest, verify_file
from edgezo.storage import JOURNAL, is_run, sha256_file
from edgezo.unused import unused_settings

if TYPE_CHECKING:
    from edgezo.runtime.run import Run


def inspect_path(path: Path) -> dict[str, Any]:
    """Facts of an edge model (every file's hash is checked) or of a run.

    Raises:
        EdgezoError: it is neither, or a file is damaged.
    """
    if (path / MANIFEST_NAME).is_file():
        return _edge_model(path)
    if is_run(path):
        return _run(path)
    if not path.exists():
        raise EdgezoError(f"{path}: no such directory; give an edge model or a run")
    raise EdgezoError(f"{path}: neither an edge model ({MANIFEST_NAME}) nor a run ({JOURNAL}) is in it")


def _edge_model(path: Path) -> dict[str, Any]:
    from edgezo.runtime.run import base_id

    manifest = read_manifest(path)
    for name, stored in manifest.files.items():
        verify_file(path, name, stored)
    origin, checked = manifest.origin, manifest.verification
    tied = [f"{tensor.name} = {other}" for tensor in manifest.tensors for other in tensor.tied_to]
    scales = {tensor.quantized.scales for tensor in manifest.tensors if tensor.quantized}
    adapter = manifest.adapter
    tunable = {
        "tunable_parameters": manifest.tunable_size,
        "tunable_tensors": len(manifest.tunable),
        "tunable_kinds": sorted({tensor.kind for tensor in manifest.tunable}),
    }
    return {
        "edge_model": str(path),
        "base": base_id(manifest),
        "model": origin.id,
        "revision": origin.revision,
        "license": origin.license,
        "architecture": origin.model_type,
        "family": origin.family,
        "classes": manifest.classes,
        "new_head": manifest.new_weights,
        "pooling": manifest.pooling,
        "context_length": origin.context_length,
        "vocabulary": origin.vocab_size,
        # HEAD_TOKENS are ids
        "parameters": sum(tensor.parameters for tensor in manifest.tensors if tensor.name not in {*scales, PREFIX, HEAD_TOKENS}),
        "weights": manifest.weights,
        "adapter": adapter.kind if adapter else None,
        **({"adapter_targets": len(adapter.targets)} if adapter and adapter.targets else {}),
        **({"prefix_tokens": adapter.tokens} if adapter and adapter.tokens else {}),
        **(tunable if manifest.tunable else {}),
        "tied": tied,
        "layers": 1 + max((tensor.layer for tensor in manifest.tensors if tensor.layer is not None), default=-1),
        "chat_template": manifest.tokenizer.chat_template is not None,
        "tuned": [
            f"step {run.step} of the run with journal {run.journal[:12]} on base {run.base[:12]}, share {run.weight:g}"
            for run in manifest.tuned
        ],
        **{name: value for name, value in (manifest.reading or {}).items() if value != TuneConfig.model_fields[name].default},
        "bytes": sum(file.bytes for file in manifest.files.values()),
        "files_intact": len(manifest.files),
        "largest_log_prob_difference": checked.largest_log_prob_difference if checked else None,
        "made_by": f"edgezo {manifest.edgezo}",
    }


def _run(path: Path) -> dict[str, Any]:
    from edgezo.runtime.run import read_run, read_summary

    run = read_run(path)
    unused = unused_settings(run.config, bool(run.evaluations))
    settings = {name: value for name, value in run.config.model_dump().items() if value is not None and name not in unused}
    summary = read_summary(path)
    ended = _ended(run, summary)
    facts: dict[str, Any] = {
        "run": str(path),
        "steps": len(run.records),
        "ended": ended,
        **({"best_step": run.best_step} if run.evaluations else {}),
        # the last record may have been followed by an evaluation or another look
        "seconds": summary["seconds"]
        if ended is not None and ended == summary.get("ended") and "seconds" in summary
        else round(run.seconds, 1),
        "base": run.header.get("base"),
    }
    if run.journal.undos:
        facts["times_gone_back"] = run.journal.undos
    facts["journal_bytes"] = run.journal.whole_bytes
    facts["journal_sha256"] = sha256_file(path / JOURNAL)
    if (head := run.journal.head_at(0)) is not None:
        probe = f", and a probe of the attention of {len(head.probe)} layers" if head.probe.size else ""
        facts["head_at_start"] = f"rows of the head for {len(head.tokens)} tokens{probe}"
    if run.journal.untuned is not None:
        facts["valid_before_start"] = run.journal.untuned.as_dict()
    for step in dict.fromkeys([0, run.best_step, len(run.records)]):
        if step in run.evaluations:
            facts[f"valid_at_step_{step}"] = run.evaluations[step].as_dict()
    if run.records:
        facts["last_loss"] = run.records[-1].loss
    for name, value in settings.items():
        facts["steps_asked" if name == "steps" else name] = value
        if name == "lr" and run.journal.lr_scale != 1.0:
            facts["lr_lowered_to"] = value * run.journal.lr_scale
    return facts


def _ended(run: "Run", summary: dict[str, Any]) -> Any:
    """How the run ended; None where that is not recorded of these steps."""
    from edgezo.runtime.run import is_held

    if is_held(run.directory):
        return "not yet, a process is tuning it"
    made, ended = len(run.records), summary.get("ended")
    gone_on = ended == "finished" and run.config.total_steps not in (None, made)  # and was cut off before the first step
    return ended if summary.get("steps") == made and not gone_on else None
