"""A torch model to an ONNX graph whose weights are inputs under their Hugging Face names.

Tracing with `export_params=False` and without constant folding keeps every weight's own name and layout, stores a tied weight
once, and writes no weight at all: SmolLM2-135M gives a graph of 1.4 MB in 6 s.
"""

import inspect
import tempfile
from pathlib import Path
from typing import Any

import onnx
import torch

from edgezo.errors import ExportError, first_line
from edgezo.export.attention import traced_attention
from edgezo.export.decoder import EXPORTED, Decoder, Weight
from edgezo.export.quiet import quiet
from edgezo.manifest import Family

LOGIT_SCALES = ("logit_scale", "logits_scaling", "final_logit_softcapping", "lm_head_multiplier")  # Cohere, Granite, Gemma 2, Falcon H1
OPSET = 17  # the newest that onnxruntime 1.18 (JetPack 6) runs with every operator used here


TASKS: dict[Family, tuple[str, str]] = {  # of optimum, and in words
    "causal": ("text-generation-with-past", "text generation"),
    "masked": ("fill-mask", "masked language models"),
    "classifier": ("text-classification", "text classification"),
}


def trace_decoder(model: Any, family: Family = "causal") -> Decoder:
    """Trace a model, a causal one with its KV cache, through optimum's configuration for its architecture.

    Args:
        model: a `transformers` PreTrainedModel in float32 on the CPU, in evaluation mode.
        family: what it computes: logits of next tokens, of all tokens, or of classes.

    Raises:
        ExportError: optimum does not export the architecture for this, or tracing failed.
    """
    config = _onnx_config(model, family)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tied: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name != names[id(parameter)]:
            tied.setdefault(names[id(parameter)], []).append(name)
    graph, inputs = _trace(model, config)
    state = dict(model.state_dict(keep_vars=True))
    weights: dict[str, Weight] = {}
    for value in graph.graph.input:
        if value.name in inputs:
            continue
        if value.name not in state:
            raise ExportError(
                f"{model.config.model_type}: the trace has an input {value.name!r} that is no weight; this model needs another transformers version"
            )
        tensor = state[value.name].detach()
        weights[value.name] = Weight(
            name=value.name,
            array=tensor.numpy(),
            trainable=value.name in names.values() and tensor.is_floating_point(),
            tied_to=tied.get(value.name, []),
        )
    lost = sorted(set(names.values()) - weights.keys())
    if lost:
        raise ExportError(
            f"{model.config.model_type}: {len(lost)} parameters are missing from the traced graph ({', '.join(lost[:3])}); this architecture cannot be exported faithfully"
        )
    return Decoder(graph, weights, family=family, head=_head(model, family))


def _head(model: Any, family: Family) -> str | None:
    """Name of the weight of the vocabulary projection, or of the last layer of classes, when what it gives are the logits."""
    if any(getattr(model.config, name, None) not in {None, 1} for name in LOGIT_SCALES):
        return None
    if family == "classifier":
        linear = [name for name, module in model.named_modules() if getattr(module, "out_features", None) == model.config.num_labels]
        return f"{linear[-1]}.weight" if linear else None
    projection = model.get_output_embeddings()
    return next((f"{name}.weight" for name, module in model.named_modules() if module is projection), None)


def _onnx_config(model: Any, family: Family) -> Any:
    """optimum's export configuration, for a causal model with past keys and values as inputs."""
    import optimum.exporters.onnx.model_configs  # noqa: F401  registers the architectures
    from optimum.exporters.tasks import TasksManager

    task, words = TASKS[family]
    model_type = model.config.model_type
    try:
        supported = TasksManager.get_supported_tasks_for_model_type(model_type, "onnx", library_name="transformers")
        if task not in supported:
            raise KeyError(task)
        constructor = TasksManager.get_exporter_config_constructor(exporter="onnx", model=model, task=task, library_name="transformers")
    except (KeyError, ValueError):
        raise ExportError(f"{model_type}: not an architecture that optimum exports for {words}; edgezo exports {EXPORTED}") from None
    past = {"use_past": True, "use_past_in_inputs": True} if family == "causal" else {}
    return constructor(model.config, **past)


def _trace(model: Any, config: Any) -> tuple[onnx.ModelProto, list[str]]:
    """Run the TorchScript exporter; returns the graph and the names of its true inputs."""
    for key, value in (config.values_override or {}).items():
        setattr(model.config, key, value)
    # logits_to_keep would otherwise be traced as an extra input without a name
    arguments = {"logits_to_keep": 0} if "logits_to_keep" in _forward_parameters(model) else {}
    with (
        torch.no_grad(),
        quiet(),
        tempfile.TemporaryDirectory() as folder,
        config.patch_model_for_export(model, model_kwargs=arguments),
        traced_attention(model),
    ):
        dummy = config.rename_ambiguous_inputs(config.generate_dummy_inputs(framework="pt"))
        inputs = config.ordered_inputs(model)
        path = Path(folder) / "traced.onnx"
        # the exporter merges parameters of equal values (norms of ones, biases of zeros) unless the root says it is in training;
        # its modules, dropout among them, stay in evaluation mode (torch 2.4 to 2.13)
        model.training = True
        try:
            torch.onnx.export(
                model,
                (dummy,),
                f=str(path),
                input_names=list(inputs),
                output_names=list(config.outputs),
                dynamic_axes={**inputs, **config.outputs},
                opset_version=OPSET,
                do_constant_folding=False,
                export_params=False,
                training=torch.onnx.TrainingMode.PRESERVE,
                dynamo=False,
            )
        except Exception as error:  # the exporter raises many kinds; the first line says which operator
            raise ExportError(f"{model.config.model_type}: torch could not trace the model: {first_line(error)}") from error
        finally:
            model.training = False
        return onnx.load(path), list(inputs)


def _forward_parameters(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)
