"""Adapters of others and for others: PEFT folders and .onnx_adapter files."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from edgezo.adapters import HEAD_ROWS, HEAD_TOKENS, PREFIX
from edgezo.config import ALL_LINEAR, ALPHA_LIMIT, RANK_LIMIT
from edgezo.errors import AdapterError, first_line
from edgezo.manifest import Manifest
from edgezo.runtime.head_rows import NO_ROWS, HeadRows, refuse_unnamed_head
from edgezo.runtime.lora import A, B, Lora
from edgezo.runtime.prefix import Prefix
from edgezo.storage import PART

Array = npt.NDArray[Any]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
STEM = "base_model.model."  # what PEFT puts before every module name
PROMPT = "prompt_embeddings"  # of a prefix: [tokens, layers * 2 * heads * head_dim]
BASE_KEY = "edgezo_base"  # in the metadata of the tensors: Origin.weights_sha256 of the model that was tuned
ONNX_SUFFIX = ".onnx_adapter"
CONFIG_BYTES_LIMIT = 1 << 20
TENSORS_BYTES_LIMIT = 1 << 32
HEAD_TOKENS_LIMIT = 4096
PATTERNS = ("alpha_pattern", "rank_pattern")
OWN_SIZES = tuple(zip(PATTERNS, ("lora_alpha", "r"), strict=True))
UNSUPPORTED = ("use_dora", "modules_to_save", *PATTERNS, "lora_bias", "alora_invocation_tokens")


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
        return _lora(path, manifest, _onnx_matrices(path, manifest), alpha=None, rank=None)
    module = _head_module(manifest)
    config, tensors = read_peft_config(path, module), _read_tensors(path, manifest)
    kind = {"LORA": "lora", "PREFIX_TUNING": "prefix"}.get(str(config.get("peft_type")))
    if kind != manifest.adapter.kind:
        raise AdapterError(
            f"{path}: holds {config.get('peft_type')}, the edge model is prepared for {manifest.adapter.kind}; export it with --adapter {kind or 'lora'}"
        )
    if kind == "prefix":
        return _prefix(path, manifest, tensors)
    modules = _peft_matrices(path, tensors)
    if {A, B} <= modules.get(module, {}).keys():
        alpha, rank = ((config.get(pattern) or {}).get(module, config[name]) for pattern, name in OWN_SIZES)
        if not (_within(rank, int, RANK_LIMIT) and _within(alpha, int | float, ALPHA_LIMIT)):
            raise AdapterError(f"{path / CONFIG}: the head has rank {rank!r:.40} with alpha {alpha!r:.40}; save the adapter again")
        modules[module][A] = modules[module][A] * np.float32(alpha / rank)
    lora = _lora(path, manifest, modules, float(config["lora_alpha"]), config["r"])
    if config.get("use_rslora"):  # alpha / sqrt(rank) there, alpha / rank here
        lora.alpha *= math.sqrt(lora.rank)
    missing = [target.module for target in lora.targets if _is_target(target.module, config) and target.module not in lora.given]
    if missing:
        raise AdapterError(f"{path}: {len(missing)} layers that its {CONFIG} names have no tensors ({missing[0]}); save the adapter again")
    return lora


def read_peft_config(path: Path, head: str | None = None) -> dict[str, Any]:
    """adapter_config.json of a PEFT folder; the module `head` may have a rank and an alpha of its own.

    Raises:
        AdapterError: it is not there, not readable, or asks for what edgezo has not.
    """
    file = path / CONFIG
    if not file.is_file():
        raise AdapterError(
            f"{path}: no adapter ({CONFIG} is missing); give a PEFT folder (edgezo merge DIR RUN --format peft makes one of a run)"
        )
    try:
        if file.stat().st_size > CONFIG_BYTES_LIMIT:
            raise AdapterError(f"{file}: larger than {CONFIG_BYTES_LIMIT} bytes; this is no adapter configuration")
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{file}: not readable as JSON ({first_line(error)}); save the adapter again") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{file}: holds a {type(config).__name__}, not settings; save the adapter again")
    for name in [*UNSUPPORTED, *(["bias"] if config.get("bias", "none") != "none" else [])]:
        patterns = config.get(name) if name in PATTERNS else None
        if config.get(name) and not (isinstance(patterns, dict) and patterns.keys() == {head}):
            raise AdapterError(f"{file}: has {name} = {config[name]!r}, which edgezo does not do; train the adapter without it")
    if config.get("peft_type") == "LORA":
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if not (_within(rank, int, RANK_LIMIT) and _within(alpha, int | float, ALPHA_LIMIT)):
            raise AdapterError(
                f"{file}: rank {rank!r:.40} with alpha {alpha!r:.40}; numbers above 0, at most {RANK_LIMIT} and {ALPHA_LIMIT:g}, are expected"
            )
    return config


def _within(value: Any, kind: Any, limit: float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value <= limit


def _is_target(module: str, config: dict[str, Any]) -> bool:
    """Whether a PEFT configuration names this layer: a list holds ends of names, a string is an expression over whole names."""
    named, layers = config.get("target_modules"), config.get("layers_to_transform")
    if layers is not None or not isinstance(named, list | str) or named == ALL_LINEAR:
        return False  # it does not say which
    if isinstance(named, list):
        return any(isinstance(name, str) and (module == name or module.endswith(f".{name}")) for name in named)
    try:
        return re.fullmatch(named, module) is not None
    except re.error:
        return False


def write_peft(adapter: Lora | Prefix, manifest: Manifest, folder: Path, head: HeadRows = NO_ROWS) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` loads onto the source model.

    Rows of the head are LoRA of their number at the head: A the rows, B ones at their tokens.

    Args:
        adapter: to write.
        manifest: of the edge model it was tuned on.
        folder: an existing, empty directory.
        head: rows of the head that were changed.

    Raises:
        AdapterError: rows of the head were changed, which this model or a folder of a prefix cannot say.
    """
    refuse_unnamed_head(head, manifest)
    # without a task PEFT leaves the rest of a model as it is; that of classifiers would put a copy of the head in place of its target
    task = "CAUSAL_LM" if manifest.origin.family == "causal" else None
    common = {"base_model_name_or_path": manifest.origin.id, "revision": None, "task_type": task, "inference_mode": True}
    if isinstance(adapter, Prefix):
        if len(head.tokens):
            raise AdapterError(
                f"{manifest.origin.id}: the run changed rows of the head, which a PEFT folder of a prefix cannot hold; use --format edge, or tune with --start none"
            )
        layers, _, heads, tokens, head_dim = adapter.array.shape
        # PEFT keeps [tokens, layers * 2, heads, head_dim]
        tensors = {PROMPT: np.ascontiguousarray(adapter.array.transpose(3, 0, 1, 2, 4)).reshape(tokens, -1)}
        config = {
            **common, "peft_type": "PREFIX_TUNING", "num_virtual_tokens": tokens, "num_layers": layers, "num_attention_heads": heads,
            "token_dim": heads * head_dim, "num_transformer_submodules": 1, "prefix_projection": False,
            "encoder_hidden_size": heads * head_dim,
        }  # fmt: skip
    else:
        tensors = {}
        for target, a, b in zip(adapter.targets, adapter.matrices(A), adapter.matrices(B), strict=True):
            tensors[f"{STEM}{target.a}"], tensors[f"{STEM}{target.b}"] = np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
        modules, patterns = _target_modules(adapter, manifest), {}
        if len(head.tokens):
            module, count, parts = _head_module(manifest), len(head.tokens), _as_lora(folder, head, manifest)
            tensors[f"{STEM}{module}.lora_A.weight"], tensors[f"{STEM}{module}.lora_B.weight"] = (
                np.ascontiguousarray(parts[name].T) for name in (A, B)
            )
            modules, patterns = [*modules, module], {"rank_pattern": {module: count}, "alpha_pattern": {module: count}}
        alpha = int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha
        config = {
            **common, "peft_type": "LORA", "r": adapter.rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none",
            "target_modules": modules, "fan_in_fan_out": _is_in_out(adapter, manifest),
            "init_lora_weights": True, **patterns,
        }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    metadata = {"format": "pt", BASE_KEY: manifest.origin.weights_sha256 or ""}
    (folder / TENSORS).write_bytes(save(tensors, metadata))  # save_file would make a file that no other user can read


def write_onnx_adapter(adapter: Lora | Prefix, manifest: Manifest, path: Path, head: HeadRows = NO_ROWS) -> None:
    """Write what the scoring graph is fed (for LoRA the generation graph too) as a file that `onnxruntime.LoraAdapter` loads.

    References:
        onnxruntime >= 1.20: LoraAdapter, RunOptions.add_active_adapter; alpha / rank is multiplied into A.
    """
    if not hasattr(onnxruntime, "AdapterFormat"):
        raise AdapterError(
            f"onnxruntime {onnxruntime.__version__} has no .onnx_adapter files; update it to 1.20 or later, or use --format peft"
        )
    feeds = {**adapter.feeds(), **(head.feeds() if len(head.tokens) else {})}
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for name, array in feeds.items()}
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(_model_version(manifest))
    file.set_parameters(values)
    part = path.with_name(f".{path.name}{PART}")
    try:
        file.export_adapter(str(part))
        onnxruntime.AdapterFormat.read_adapter(str(part))  # the engine does not tell of a full disk
        os.replace(part, path)
    except Exception as error:
        raise AdapterError(
            f"{path}: cannot be written ({first_line(error)}); nothing was kept, free space or choose another place"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _model_version(manifest: Manifest) -> int:
    """The number in an .onnx_adapter file that tells its base: 28 bits of the hash of the source's weights; 1 where that is unknown."""
    return int((manifest.origin.weights_sha256 or "0000001")[:7], 16)


def _read_tensors(path: Path, manifest: Manifest) -> dict[str, Array]:
    file = path / TENSORS
    if not file.is_file():
        raise AdapterError(f"{path}: {TENSORS} is missing; save the adapter as safetensors (PEFT's default)")
    if file.stat().st_size > TENSORS_BYTES_LIMIT:
        raise AdapterError(f"{file}: larger than {TENSORS_BYTES_LIMIT} bytes; this is no adapter")
    try:
        with safe_open(file, framework="np") as opened:
            made_for = (opened.metadata() or {}).get(BASE_KEY)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError, TypeError, AttributeError, MemoryError) as error:  # float8 has no NumPy type
        raise AdapterError(f"{file}: not readable as float tensors ({first_line(error)}); save the adapter again in float32") from None
    own = manifest.origin.weights_sha256
    if made_for and own and made_for != own:
        raise AdapterError(
            f"{path}: was tuned on another base (weights {made_for[:12]}) than this edge model ({own[:12]}); give its own base"
        )
    for name, array in tensors.items():
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise AdapterError(f"{file}: {name} holds NaN, infinity or {array.dtype}; it cannot be used")
    return {name: array.astype(np.float32) for name, array in tensors.items()}


def _peft_matrices(path: Path, tensors: dict[str, Array]) -> dict[str, dict[str, Array]]:
    """module: {lora_A: A^T [in, rank], lora_B: B^T [rank, out]}."""
    modules: dict[str, dict[str, Array]] = {}
    for name, array in tensors.items():
        module, _, rest = name.removeprefix(STEM).rpartition(".lora_")
        if rest not in {"A.weight", "B.weight"} or array.ndim != 2:
            raise AdapterError(
                f"{path}: tensor {name!r} of shape {list(array.shape)} is no LoRA matrix of a linear layer; it cannot be used"
            )
        modules.setdefault(module, {})[f"lora_{rest[0]}"] = array.T
    return modules


def _onnx_matrices(path: Path, manifest: Manifest) -> dict[str, dict[str, Array]]:
    if manifest.adapter is None or manifest.adapter.kind != "lora":
        raise AdapterError(f"{path}: .onnx_adapter files are read for LoRA alone; give the prefix as a PEFT folder")
    try:
        file = onnxruntime.AdapterFormat.read_adapter(str(path))
        parameters, made_for = file.get_parameters(), file.get_model_version()
    except Exception as error:  # the engine's own exception classes are not importable in every version
        raise AdapterError(f"{path}: onnxruntime {onnxruntime.__version__} cannot read it ({first_line(error)})") from None
    if made_for != 1 and made_for != _model_version(manifest):
        raise AdapterError(f"{path}: was tuned on another base than this edge model; give its own base")
    modules: dict[str, dict[str, Array]] = {}
    if {HEAD_TOKENS, HEAD_ROWS} <= parameters.keys():
        tokens, rows = (np.array(parameters.pop(name).numpy()) for name in (HEAD_TOKENS, HEAD_ROWS))
        modules[_head_module(manifest)] = _as_lora(path, HeadRows(tokens, rows), manifest)
    for name, value in parameters.items():
        module, _, rest = name.rpartition(".lora_")
        array = np.array(value.numpy())
        if rest not in {"A.weight", "B.weight"} or array.ndim != 3 or array.dtype != np.float32 or not np.isfinite(array).all():
            raise AdapterError(f"{path}: parameter {name!r} is no LoRA matrix of finite float32; it cannot be used")
        modules.setdefault(module, {})[f"lora_{rest[0]}"] = array[0]
    return modules


def _lora(path: Path, manifest: Manifest, modules: dict[str, dict[str, Array]], alpha: float | None, rank: int | None) -> Lora:
    """`alpha` None says that the scaling is in A, `rank` None that any will do."""
    assert manifest.adapter is not None
    modules = dict(modules)
    head = _head(path, modules.pop(_head_module(manifest), None))
    targets = {target.module: target for target in manifest.adapter.targets}
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


def _head_module(manifest: Manifest) -> str:
    """Name of the vocabulary projection."""
    return (manifest.head or "head").removesuffix(".weight")


def _as_lora(path: Path, head: HeadRows, manifest: Manifest) -> dict[str, Array]:
    """Rows of the head as LoRA of their number: A the rows, B ones at their tokens."""
    tokens, rows, size = head.tokens, head.rows, manifest.origin.vocab_size
    fits = tokens.dtype == np.int64 and rows.dtype == np.float32 and tokens.ndim == 1 and rows.ndim == 2 and rows.shape[1] == len(tokens)
    if not fits or not np.isfinite(rows).all() or (len(tokens) and not (tokens.min() >= 0 and tokens.max() < size)):
        raise AdapterError(f"{path}: its rows of the head are no finite float32 of tokens of this model; it cannot be used")
    ones = np.zeros((len(tokens), size), np.float32)
    ones[np.arange(len(tokens)), tokens] = 1
    return {A: rows, B: ones}


def _head(path: Path, pair: dict[str, Array] | None) -> HeadRows:
    """Rows of the head from LoRA at the head whose B reaches few tokens, as `write_peft` writes it."""
    if pair is None:
        return NO_ROWS
    if pair.keys() != {A, B} or pair[A].shape[1] != pair[B].shape[0]:
        raise AdapterError(f"{path}: its matrices of the head do not fit each other; save the adapter again")
    tokens = np.flatnonzero(pair[B].any(axis=0))
    if len(tokens) > HEAD_TOKENS_LIMIT:
        raise AdapterError(
            f"{path}: changes {len(tokens)} rows of the head, edgezo takes {HEAD_TOKENS_LIMIT}; train the adapter without the head"
        )
    return HeadRows(tokens, (pair[A] @ pair[B][:, tokens]).astype(np.float32))


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


def _target_modules(adapter: Lora, manifest: Manifest) -> list[str]:
    """Short names where every layer of that name is a target, else the full ones (PEFT compares ends of names)."""
    modules = {target.module for target in adapter.targets}
    named = {tensor.name.removesuffix(".weight") for tensor in manifest.tensors if len(tensor.shape) > 1}
    short = {module.split(".")[-1] for module in modules}
    if {module for module in named if module.split(".")[-1] in short} == modules:
        return sorted(short)
    return sorted(modules)


def _is_in_out(adapter: Lora, manifest: Manifest) -> bool:
    """Whether the source keeps these weights as [in, out], as GPT-2 does."""
    transposed = {tensor.name: tensor.transposed for tensor in manifest.tensors}
    return all(target.out_first == transposed[f"{target.module}.weight"] for target in adapter.targets)
