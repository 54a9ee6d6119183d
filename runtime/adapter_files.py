"""Adapters of others: PEFT folders and .onnx_adapter files, checked against an edge model."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgezo.adapters import PREFIX, A, B
from edgezo.config import ALPHA_LIMIT, RANK_LIMIT
from edgezo.errors import AdapterError
from edgezo.manifest import Manifest
from edgezo.runtime.attention_probe import take_probe
from edgezo.runtime.head_rows import NO_ROWS, head_from_lora, head_module
from edgezo.runtime.lora import Lora
from edgezo.runtime.onnx_adapter import ONNX_SUFFIX, onnx_matrices
from edgezo.runtime.peft_folder import CONFIG, OWN_SIZES, PROMPT, is_target, peft_matrices, read_peft_config, read_tensors, within
from edgezo.runtime.prefix import Prefix

Array = npt.NDArray[Any]


def read_adapter(path: Path, manifest: Manifest) -> Lora | Prefix:
    """Read an adapter for an edge model.

    Args:
        path: a PEFT folder, or an .onnx_adapter file (LoRA).
        manifest: of the edge model; its branch points say what may be adapted. Targets that the adapter leaves out stay unchanged.

    Raises:
        AdapterError: it cannot be read, belongs to another base, is of another kind, or changes what this edge model cannot.
    """
    if manifest.adapter is None:
        raise AdapterError(f"{path}: this edge model has no branch points for adapters; export it again with --adapter lora or prefix")
    if path.is_file() and path.suffix == ONNX_SUFFIX:
        return _lora(path, manifest, onnx_matrices(path, manifest), alpha=None, rank=None)
    head, probed = head_module(manifest), [target.module for target in manifest.probes]
    config, tensors = read_peft_config(path, {head, *probed}), read_tensors(path, manifest)
    kind = {"LORA": "lora", "PREFIX_TUNING": "prefix"}.get(str(config.get("peft_type")))
    if kind != manifest.adapter.kind:
        raise AdapterError(
            f"{path}: holds {config.get('peft_type')}, the edge model is prepared for {manifest.adapter.kind}; export it with --adapter {kind or 'lora'}"
        )
    if kind == "prefix":
        return _prefix(path, manifest, tensors)
    modules = peft_matrices(path, tensors)
    common = config["lora_alpha"] / config["r"]
    targets = {target.module for target in manifest.adapter.targets}
    for module in [head, *probed]:
        alpha, rank = ((config.get(pattern) or {}).get(module, config[name]) for pattern, name in OWN_SIZES)
        if not (within(rank, int, RANK_LIMIT) and within(alpha, int | float, ALPHA_LIMIT)):
            raise AdapterError(f"{path / CONFIG}: {module} has rank {rank!r:.40} with alpha {alpha!r:.40}; save the adapter again")
        if A in modules.get(module, {}):  # LoRA of a run has one scaling, a layer without it none
            modules[module][A] = modules[module][A] * np.float32(alpha / rank / (common if module in targets else 1))
    lora = _lora(path, manifest, modules, float(config["lora_alpha"]), config["r"])
    if config.get("use_rslora"):  # alpha / sqrt(rank) there, alpha / rank here
        lora.alpha *= math.sqrt(lora.rank)
    missing = [target.module for target in lora.targets if is_target(target.module, config) and target.module not in lora.given]
    if missing:
        raise AdapterError(f"{path}: {len(missing)} layers that its {CONFIG} names have no tensors ({missing[0]}); save the adapter again")
    return lora


def _lora(path: Path, manifest: Manifest, modules: dict[str, dict[str, Array]], alpha: float | None, rank: int | None) -> Lora:
    """`alpha` None says that the scaling is in A, `rank` None that any will do."""
    assert manifest.adapter is not None
    targets, modules, module = {target.module: target for target in manifest.adapter.targets}, dict(modules), head_module(manifest)
    head = head_from_lora(path, modules.pop(module)) if module in modules.keys() - targets.keys() else NO_ROWS
    if len(head.tokens) and not manifest.takes_head_rows:
        raise AdapterError(f"{path}: changes rows of the head, and this edge model was exported without inputs for them; export it again")
    head = head._replace(probe=take_probe(modules, manifest, alpha / rank if alpha and rank else 1.0))
    strange = [module for module in modules if module not in targets]
    if strange or not modules:
        what = f"changes {len(strange)} layers without branch points ({strange[0]})" if strange else "holds no matrices"
        raise AdapterError(f"{path}: {what}; export the model with --targets that cover it")
    ranks = set()
    for module, pair in modules.items():
        if pair.keys() != {A, B}:
            raise AdapterError(
                f"{path}: {module} has {', '.join(sorted(pair))} alone; lora_A and lora_B are both needed, save the adapter again"
            )
        target, a, b = targets[module], pair[A], pair[B]
        if (a.shape[0], b.shape[1]) != (target.in_features, target.out_features) or a.shape[1] != b.shape[0]:
            raise AdapterError(
                f"{path}: {module} has A of {list(a.T.shape)} and B of {list(b.T.shape)}, the layer has {target.in_features} inputs and {target.out_features} outputs"
            )
        ranks.add(a.shape[1])
    if len(ranks) != 1 or 0 in ranks:
        raise AdapterError(f"{path}: ranks {sorted(ranks)}; edgezo needs one rank for all layers, above 0")
    if rank not in {None, *ranks} or max(ranks) > RANK_LIMIT:
        raise AdapterError(f"{path}: its matrices have rank {max(ranks)}, its {CONFIG} says {rank}; save the adapter again")
    (rank,) = ranks
    lora = Lora(manifest.adapter.targets, rank, rank if alpha is None else alpha)
    lora.given, lora.head = set(modules), head
    for target, a, b in zip(lora.targets, lora.matrices(A), lora.matrices(B), strict=True):
        if target.module in modules:
            a[...], b[...] = modules[target.module][A], modules[target.module][B]
    return lora


def _prefix(path: Path, manifest: Manifest, tensors: dict[str, Array]) -> Prefix:
    (stored,) = [tensor for tensor in manifest.tensors if tensor.name == PREFIX]
    layers, _, heads, tokens, head_dim = stored.shape
    found = tensors.get(PROMPT)
    if found is None or found.shape != (tokens, layers * 2 * heads * head_dim):
        shape = None if found is None else list(found.shape)
        raise AdapterError(
            f"{path}: its prefix has shape {shape}, this edge model needs [{tokens}, {layers * 2 * heads * head_dim}]; export with --tokens of the adapter"
        )
    array = found.reshape(tokens, layers, 2, heads, head_dim).transpose(1, 2, 3, 0, 4)
    return Prefix(np.ascontiguousarray(array))
