"""PEFT folders: adapter_config.json and adapter_model.safetensors."""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from edgezo.adapters import A, B
from edgezo.config import ALL_LINEAR, ALPHA_LIMIT, RANK_LIMIT
from edgezo.errors import AdapterError, first_line
from edgezo.manifest import Manifest
from edgezo.runtime.attention_probe import add_probe
from edgezo.runtime.head_rows import NO_ROWS, HeadRows, head_as_lora, head_module, refuse_beside_lora, refuse_unnamed_head
from edgezo.runtime.lora import Lora
from edgezo.runtime.prefix import Prefix
from edgezo.storage import is_run

Array = npt.NDArray[Any]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
STEM = "base_model.model."  # what PEFT puts before every module name
PROMPT = "prompt_embeddings"  # of a prefix: [tokens, layers * 2 * heads * head_dim]
BASE_KEY = "edgezo_base"  # in the metadata of the tensors: Origin.weights_sha256 of the model that was tuned
CONFIG_BYTES_LIMIT = 1 << 20
TENSORS_BYTES_LIMIT = 1 << 32
PATTERNS = ("alpha_pattern", "rank_pattern")
OWN_SIZES = tuple(zip(PATTERNS, ("lora_alpha", "r"), strict=True))
UNSUPPORTED = ("use_dora", "modules_to_save", *PATTERNS, "lora_bias", "alora_invocation_tokens")


def read_peft_config(path: Path, own: Collection[str] = ()) -> dict[str, Any]:
    """adapter_config.json of a PEFT folder; the modules `own` may have a rank and an alpha of their own.

    Raises:
        AdapterError: it is not there, not readable, or asks for what edgezo has not.
    """
    file = path / CONFIG
    if not file.is_file():
        if is_run(path):
            raise AdapterError(
                f"{path}: a run, no adapter; make an adapter of it with edgezo merge DIR {path} --format peft -o FOLDER (eval, predict, generate and chat take it as --run)"
            )
        found = "no such adapter" if not path.exists() else f"no adapter ({CONFIG} is missing)"
        raise AdapterError(f"{path}: {found}; give a PEFT folder (edgezo merge DIR RUN --format peft makes one of a run)")
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
        if config.get(name) and not (isinstance(patterns, dict) and patterns.keys() <= set(own)):
            raise AdapterError(f"{file}: has {name} = {config[name]!r}, which edgezo does not do; train the adapter without it")
    if config.get("peft_type") == "LORA":
        rank, alpha = config.get("r"), config.get("lora_alpha")
        if not (within(rank, int, RANK_LIMIT) and within(alpha, int | float, ALPHA_LIMIT)):
            raise AdapterError(
                f"{file}: rank {rank!r:.40} with alpha {alpha!r:.40}; numbers above 0, at most {RANK_LIMIT} and {ALPHA_LIMIT:g}, are expected"
            )
    return config


def is_target(module: str, config: dict[str, Any]) -> bool:
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

    Rows of the head are LoRA of their number at the head: A the rows, B ones at their tokens. A probe is joined to the LoRA of its layers, or
    stands alone there with a scaling of 1.

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
        matrices = zip(adapter.targets, adapter.matrices(A), adapter.matrices(B), strict=True)
        pairs = {target.module: {A: a, B: b} for target, a, b in matrices}
        modules, scalings = _target_modules(adapter, manifest), dict.fromkeys(pairs, adapter.scaling)
        refuse_beside_lora(head, manifest, pairs, "a PEFT folder")
        add_probe(pairs, head.probe, manifest, adapter.scaling)
        if len(head.tokens):
            pairs[head_module(manifest)] = head_as_lora(folder, head, manifest)
        modules += [module for module in pairs if module not in scalings]
        tensors = {
            f"{STEM}{module}.{name}.weight": np.ascontiguousarray(array.T) for module, pair in pairs.items() for name, array in pair.items()
        }
        ranks = {module: pair[B].shape[0] for module, pair in pairs.items()}
        own = {module: rank for module, rank in ranks.items() if module not in scalings or rank != adapter.rank}
        alphas = {module: scalings.get(module, 1) * rank for module, rank in own.items()}
        patterns = {"rank_pattern": own, "alpha_pattern": alphas} if own else {}
        alpha = int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha
        config = {
            **common, "peft_type": "LORA", "r": adapter.rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none",
            "target_modules": modules, "fan_in_fan_out": _is_in_out(adapter, manifest),
            "init_lora_weights": True, **patterns,
        }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    metadata = {"format": "pt", BASE_KEY: manifest.origin.weights_sha256 or ""}
    (folder / TENSORS).write_bytes(save(tensors, metadata))  # save_file would make a file that no other user can read


def read_tensors(path: Path, manifest: Manifest) -> dict[str, Array]:
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


def peft_matrices(path: Path, tensors: dict[str, Array]) -> dict[str, dict[str, Array]]:
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


def within(value: Any, kind: Any, limit: float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value <= limit


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
