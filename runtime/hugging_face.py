"""Tuned weights under their Hugging Face names and shapes, and as a folder that transformers loads."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from edgezo.adapters import HEAD_ROWS, HEAD_TOKENS, PROBE_A, A, B, LoraTarget
from edgezo.errors import AdapterError
from edgezo.manifest import Tensor
from edgezo.runtime.attention_probe import probe_deltas
from edgezo.runtime.head_rows import refuse_unnamed_head
from edgezo.runtime.lora import Lora
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.prefix import Prefix

Floats = npt.NDArray[np.float32]
WEIGHTS, TOKENIZER_CONFIG = "model.safetensors", "tokenizer_config.json"


def frozen_array(model: EdgeModel, tensor: Tensor) -> npt.NDArray[Any]:
    """A frozen tensor as stored, mapped from its file."""
    dtype = np.dtype(tensor.dtype).newbyteorder("<")
    return np.memmap(model.directory / tensor.file, dtype, "r", offset=tensor.offset, shape=tuple(tensor.shape))


def lora_deltas(lora: Lora) -> dict[str, Callable[[], Floats]]:
    """By name of each target's weight, what makes alpha/rank * B A, float32, laid out as that weight is stored; one at a time fits memory."""

    def make(target: LoraTarget, a: Floats, b: Floats) -> Floats:
        delta: Floats = (np.float64(lora.scaling) * (a.astype(np.float64) @ b.astype(np.float64))).astype(np.float32)
        return delta.T if target.out_first else delta

    parts = zip(lora.targets, lora.matrices(A), lora.matrices(B), strict=True)
    return {f"{target.module}.weight": partial(make, target, a, b) for target, a, b in parts}


def source_weights(model: EdgeModel) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Every weight under its Hugging Face name, in the source's layout, with the adapter of `model` merged in.

    Raises:
        AdapterError: the adapter is a prefix, which is no change of weights.
    """
    if isinstance(model.adapter, Prefix):
        raise AdapterError(f"{model.directory}: a prefix is no change of weights and cannot be merged into them; use --format peft or edge")
    tensors = {tensor.name: tensor for tensor in model.manifest.tensors}
    scales = {tensor.quantized.scales for tensor in tensors.values() if tensor.quantized}
    deltas = lora_deltas(model.adapter) if isinstance(model.adapter, Lora) else {}
    refuse_unnamed_head(model.head, model.manifest)
    written = probe_deltas(model.head.probe, model.manifest)
    for name, tensor in tensors.items():
        if name in scales or name in {HEAD_TOKENS, HEAD_ROWS, PROBE_A}:
            continue
        weight: npt.NDArray[Any] = model.weights[name] if tensor.tunable else frozen_array(model, tensor)
        if tensor.quantized is not None:
            weight = tensor.quantized.dequantize(weight, frozen_array(model, tensors[tensor.quantized.scales]))
        elif tensor.dtype == "float16":
            weight = weight.astype(np.float32)
        for changes in (deltas, written):
            if name in changes:
                weight = weight + changes[name]()
        yield from _with_head(model, tensor, np.ascontiguousarray(weight.T if tensor.transposed else weight))


def _with_head(model: EdgeModel, tensor: Tensor, weight: npt.NDArray[Any]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """A weight under its name; where it is the head's, with its rows changed, apart from the embedding that it was tied to."""
    names, head = [tensor.name, *tensor.tied_to], model.manifest.head
    if not len(model.head.tokens) or head not in names:
        yield tensor.name, weight
        return
    for other in [name for name in names if name != head][:1]:
        yield other, weight
    changed = weight.copy()
    changed[model.head.tokens] += model.head.rows.T
    yield str(head), changed


def write_hugging_face(model: EdgeModel, folder: Path) -> None:
    """Write config.json, model.safetensors (float32) and the tokenizer into an existing, empty directory.

    Raises:
        AdapterError: the adapter cannot be merged, transformers has no such head, or the edge model keeps no config.json (made by an
            older edgezo).
    """
    manifest = model.manifest
    if manifest.pooling is not None:
        raise AdapterError(
            f"{model.directory}: its head has pooling {manifest.pooling}, which no model class of transformers has; use --format edge, or peft for LoRA"
        )
    if manifest.config is None or any("::" in tensor.name for tensor in manifest.tensors):
        raise AdapterError(
            f"{model.directory}: lacks what a Hugging Face folder needs (its configuration, or its own names); export the model again"
        )
    config = json.loads((model.directory / manifest.config).read_text(encoding="utf-8"))
    if len(model.head.tokens):  # no longer rows of the embedding
        config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(dict(source_weights(model)), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # save_file makes one that no other user can read
    facts = manifest.tokenizer
    shutil.copyfile(model.directory / facts.file, folder / "tokenizer.json")
    settings: dict[str, Any] = {name: token for name, token in facts.special_tokens.items() if name.endswith("_token")}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_max_length"] = manifest.origin.context_length
    settings["clean_up_tokenization_spaces"] = False
    settings["model_input_names"] = ["input_ids", "attention_mask"]  # by default token types, too, which generate() of most models refuses
    if facts.chat_template is not None:
        settings["chat_template"] = (model.directory / facts.chat_template).read_text(encoding="utf-8")
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(settings, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
