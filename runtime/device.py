"""Accelerators by name, and sessions on them."""

from typing import NamedTuple

import onnxruntime

from edgezo.errors import ConfigError, EdgeModelError, first_line


class Device(NamedTuple):
    """An engine's accelerator: its name in IOBinding, its provider, and the provider's options."""

    name: str
    provider: str
    options: dict[str, str]


# TF32 has 10 bits of significand, as float16 has: the difference of two losses drowns in its rounding where eps is small
# (docs/adapters.md)
# an arena that doubles could reserve twice the weights
CUDA = Device("cuda", "CUDAExecutionProvider", {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"})
DEVICES = {"cuda": CUDA}


def find_device(name: str) -> Device | None:
    """The device called `name`; None for the CPU.

    Raises:
        ConfigError: there is no such device, or this onnxruntime cannot use it.
    """
    if name == "cpu":
        return None
    if name not in DEVICES:
        raise ConfigError(f"--device {name}: no such device; the devices are cpu, {', '.join(DEVICES)}")
    if hasattr(onnxruntime, "preload_dlls"):  # 1.21: CUDA and cuDNN of NVIDIA's own Python packages
        onnxruntime.preload_dlls()
    device, found = DEVICES[name], onnxruntime.get_available_providers()
    if device.provider not in found:
        raise ConfigError(
            f"--device {name}: this onnxruntime {onnxruntime.__version__} has no {device.provider} (it has {', '.join(found)}); install onnxruntime-gpu as the README says (on a Jetson: docs/jetson.md), or leave --device out"
        )
    return device


def make_session(graph: str | bytes, options: onnxruntime.SessionOptions, device: Device, shown: str) -> onnxruntime.InferenceSession:
    """A session whose nodes run on the device.

    Raises:
        EdgeModelError: the engine cannot load the graph there.
        ConfigError: the provider does not start.
    """
    options.log_severity_level = 3
    # no fallback: a graph or a run that fails on the device would be tried again on the CPU
    providers = [(device.provider, device.options), *(["CPUExecutionProvider"] if device.provider != "CPUExecutionProvider" else [])]
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=providers, enable_fallback=0)
    except Exception as error:
        raise EdgeModelError(
            f"{shown}: onnxruntime {onnxruntime.__version__} cannot load it on {device.name}: {first_line(error)}"
        ) from error
    if session.get_providers()[0] != device.provider:
        raise ConfigError(
            f"--device {device.name}: {device.provider} does not start here (its CUDA or cuDNN libraries are missing or of another version); see docs/jetson.md, or leave --device out"
        )
    return session
