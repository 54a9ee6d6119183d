"""Files that `onnxruntime.LoraAdapter` loads beside the graphs of an edge model."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from edgezo.adapters import HEAD_ROWS, HEAD_TOKENS, PROBE_A, PROBE_B
from edgezo.errors import AdapterError, first_line
from edgezo.manifest import Manifest
from edgezo.runtime.attention_probe import NO_PROBE, add_probe, fits_layer, probe_feeds, probe_fits
from edgezo.runtime.head_rows import NO_ROWS, HeadRows, head_as_lora, head_module, refuse_beside_lora
from edgezo.runtime.lora import Lora
from edgezo.runtime.prefix import Prefix
from edgezo.storage import PART

Array = npt.NDArray[Any]
ONNX_SUFFIX = ".onnx_adapter"


def write_onnx_adapter(adapter: Lora | Prefix, manifest: Manifest, path: Path, head: HeadRows = NO_ROWS) -> None:
    """Write what the scoring graph is fed (for LoRA the generation graph too) as a file that `onnxruntime.LoraAdapter` loads.

    References:
        onnxruntime >= 1.20: LoraAdapter, RunOptions.add_active_adapter; alpha / rank is multiplied into A.
    """
    if not hasattr(onnxruntime, "AdapterFormat"):
        raise AdapterError(
            f"onnxruntime {onnxruntime.__version__} has no .onnx_adapter files; update it to 1.20 or later, or use --format peft"
        )
    refuse_beside_lora(
        head, manifest, {target.module for target in adapter.targets} if isinstance(adapter, Lora) else (), "an .onnx_adapter file"
    )
    feeds = {**adapter.feeds(), **(head.feeds(manifest) if len(head.tokens) else {})}
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


def onnx_matrices(path: Path, manifest: Manifest) -> dict[str, dict[str, Array]]:
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
        modules[head_module(manifest)] = head_as_lora(path, HeadRows(tokens, rows), manifest)
    probe = np.array(parameters.pop(PROBE_A).numpy()) if PROBE_A in parameters else NO_PROBE
    directions = np.array(parameters.pop(PROBE_B).numpy()) if PROBE_B in parameters else None
    if probe.size and not manifest.probes:
        raise AdapterError(f"{path}: has a probe of the attention, and this edge model was exported without inputs for it; export it again")
    if not (probe.dtype == np.float32 and probe.ndim == 3 and probe_fits(probe, manifest) and np.isfinite(probe).all()):
        raise AdapterError(f"{path}: its probe of shape {list(probe.shape)} is no finite float32 of this model's layers; it cannot be used")
    own = directions is not None and np.array_equal(directions, probe_feeds(probe, manifest).get(PROBE_B, NO_PROBE))
    if probe.size and not own:
        raise AdapterError(f"{path}: its probe writes along other directions than edgezo's; it cannot be used")
    for name, value in parameters.items():
        module, _, rest = name.rpartition(".lora_")
        array = np.array(value.numpy())
        if rest not in {"A.weight", "B.weight"} or array.ndim != 3 or array.dtype != np.float32 or not np.isfinite(array).all():
            raise AdapterError(f"{path}: parameter {name!r} is no LoRA matrix of finite float32; it cannot be used")
        modules.setdefault(module, {})[f"lora_{rest[0]}"] = array[0]
    if probe.size and not all(fits_layer(target, modules[target.module]) for target in manifest.probes if target.module in modules):
        raise AdapterError(f"{path}: lora_A and lora_B of a layer with a probe do not fit it; save the adapter again")
    add_probe(modules, probe, manifest, 1.0)
    return modules


def _model_version(manifest: Manifest) -> int:
    """The number in an .onnx_adapter file that tells its base: 28 bits of the hash of the source's weights; 1 where that is unknown."""
    return int((manifest.origin.weights_sha256 or "0000001")[:7], 16)
