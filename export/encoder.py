"""Encoders: which of the three families a source is, its head, old or new, and what of its inputs becomes part of the graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast, get_args

from onnx import TensorProto, helper

from edgezo.errors import ConfigError, ExportError, first_line
from edgezo.export.decoder import Decoder
from edgezo.export.quiet import quiet
from edgezo.export.surgery import Surgery
from edgezo.manifest import Family, Pooling

HEAD_SEED = 0  # of the weights of a new head
TOKEN_TYPES = "token_type_ids"
POOLER = "pooler"  # of --pooling: the own head of an architecture that reads one


@dataclass
class Network:
    """A loaded torch model; `new_weights` are the names of those that its files lack and a seed made; `pooling` is that of a new head."""

    model: Any
    classes: list[str] = field(default_factory=list)
    new_weights: list[str] = field(default_factory=list)
    pooling: Pooling | None = None


def parse_classes(given: str | None) -> list[str] | None:
    """`--classes 2` or `--classes negative,positive` as names; a number stands for 0, 1, ...

    Raises:
        ConfigError: fewer than two, or a name is empty or given twice.
    """
    if given is None:
        return None
    names = [name.strip() for name in given.split(",")]
    if len(names) == 1 and names[0].isdecimal() and int(names[0]) <= 10**6:
        names = [str(number) for number in range(int(names[0]))]
    if len(names) < 2 or not all(names) or len(set(names)) != len(names):
        raise ConfigError(f"--classes {given!r}: give a number of at least 2, or names as negative,positive, each once")
    return names


def check_pooling(pooling: str | None, classes: list[str] | None) -> None:
    """Refuse what is no pooling, or one that no head asks for.

    Raises:
        ConfigError: it is neither mean, cls nor pooler, or there are no classes.
    """
    if pooling is None:
        return
    if pooling not in {*get_args(Pooling), POOLER}:
        raise ConfigError(f"--pooling {pooling}: give mean, cls or pooler")
    if classes is None:
        raise ConfigError(f"--pooling {pooling}: says what a new head of classes reads; add --classes or leave it out")


def family_of(config: Any, classes: list[str] | None, shown: str) -> Family:
    """What a transformers configuration is exported as: its architecture says, or `classes`.

    Raises:
        ExportError: a classifier is asked for or given that is no encoder.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    architectures = config.architectures or []
    head = classes is not None or any(name.endswith("ForSequenceClassification") for name in architectures)
    if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or getattr(config, "is_decoder", False):
        if head:
            asked = "--classes needs an encoder" if classes is not None else "its head is one of classes"
            raise ExportError(
                f"{shown}: {asked}, {config.model_type} is a decoder; edgezo exports classifiers of encoders such as BERT, use label words on a causal model instead"
            )
        return "causal"
    if head:
        return "classifier"
    return "causal" if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures) else "masked"


def load_encoder(
    location: str,
    shown: str,
    config: Any,
    family: Family,
    where: dict[str, Any],
    classes: list[str] | None = None,
    pooling: str | None = None,
) -> Network:
    """Load a masked language model, or an encoder with its own head of classes or a new one.

    Args:
        location: hub id or folder.
        shown: as the user gave it.
        config: of the source.
        family: "masked" or "classifier".
        where: further arguments of from_pretrained.
        classes: names of a new head's classes; or other names for those of the source's own.
        pooling: what a new head reads: "mean", "cls" or "pooler"; None: what the source's 1_Pooling/config.json says, else the
            architecture's own.

    Raises:
        ExportError: it cannot be loaded, or lacks a head that nothing was said about.
    """
    from edgezo.export.pooling import HEAD, PooledClassifier, find_pooling

    own = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
    if family == "classifier":
        _check_head(shown, config, own, classes, pooling)
        if classes is not None:
            config.id2label, config.label2id = dict(enumerate(classes)), {name: number for number, name in enumerate(classes)}
    if family == "classifier" and not own and pooling is None:
        pooling = find_pooling(location, shown, where.get("revision"))
    model, missing = _from_pretrained(location, shown, config, family, where)
    if pooling == POOLER:
        _check_pooler(shown, model)
    pooled = cast(Pooling, pooling) if pooling in get_args(Pooling) else None
    model.config.architectures = [type(model if pooled is None else model.base_model).__name__]
    if pooled is not None:
        missing |= set(HEAD)
        with _seeded():
            model = PooledClassifier(model, pooled)
    new = sorted(dict(model.named_parameters()).keys() & missing)
    if family == "masked" and new:
        raise ExportError(
            f"{shown}: an encoder without the head of a masked language model ({', '.join(new[:2])} are missing); give --classes N to classify with a new head"
        )
    if own and new:
        raise ExportError(f"{shown}: its files lack {', '.join(new[:3])}; download the model again")
    names = [str(model.config.id2label[number]) for number in range(model.config.num_labels)] if family == "classifier" else []
    if len(set(names)) != len(names):
        raise ExportError(f"{shown}: two of its classes have one name ({', '.join(names[:5])}); name all {len(names)} with --classes")
    return Network(model.eval(), names, new, pooled)


def usable_context(model: Any) -> int | None:
    """Tokens that the table of positions has room for, where its first rows are not used (RoBERTa); None elsewhere."""
    from torch.nn import Embedding

    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, Embedding) and module.padding_idx is not None:
            return int(module.num_embeddings - module.padding_idx - 1)
    return None


def fix_token_types(decoder: Decoder) -> None:
    """Make token_type_ids zeros inside the graph: one text a row, one input less to feed."""
    graph = decoder.model.graph
    kept = [value for value in graph.input if value.name != TOKEN_TYPES]
    if len(kept) == len(graph.input):
        return
    del graph.input[:]
    graph.input.extend(kept)
    surgery = Surgery(graph)
    zero = helper.make_tensor("value", TensorProto.INT64, [1], [0])
    surgery.begin(
        helper.make_node("Shape", ["input_ids"], ["edgezo/ids_shape"]),
        helper.make_node("ConstantOfShape", ["edgezo/ids_shape"], [TOKEN_TYPES], value=zero),
    )
    surgery.finish()


def _from_pretrained(location: str, shown: str, config: Any, family: Family, where: dict[str, Any]) -> tuple[Any, set[str]]:
    """The model, and the names of what its files lack."""
    from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

    auto = AutoModelForMaskedLM if family == "masked" else AutoModelForSequenceClassification
    try:
        with quiet(), _seeded():
            model, report = auto.from_pretrained(
                location, config=config, attn_implementation="eager", output_loading_info=True, **_float32(), **where
            )
    except Exception as error:
        raise ExportError(f"{shown}: transformers cannot load it: {first_line(error)}") from error
    return model, set(report["missing_keys"])


def _check_pooler(shown: str, model: Any) -> None:
    if getattr(model.base_model, POOLER, None) is None:
        raise ExportError(
            f"{shown}: --pooling pooler: the head of {model.config.model_type} reads no pooler; give mean or cls, or leave --pooling out for its own"
        )


def _check_head(shown: str, config: Any, own: bool, classes: list[str] | None, pooling: str | None) -> None:
    if own and config.num_labels < 2:
        raise ExportError(
            f"{shown}: its head gives one number, not classes; edgezo tunes classifiers, give a model with two classes or more"
        )
    if own and config.problem_type not in {None, "single_label_classification"}:
        raise ExportError(
            f"{shown}: its head is for {config.problem_type}; edgezo tunes classifiers with one right class a row, give another model"
        )
    if own and pooling is not None:
        raise ExportError(
            f"{shown}: --pooling {pooling}: says what a new head reads, this model has a head of its own; leave --pooling out"
        )
    if own and classes is not None and len(classes) != config.num_labels:
        raise ExportError(
            f"{shown}: --classes has {len(classes)} classes, its own head has {config.num_labels}; leave --classes out, or name {config.num_labels}"
        )


def _float32() -> dict[str, Any]:
    import torch

    return {"dtype": torch.float32, "low_cpu_mem_usage": True}


@contextmanager
def _seeded() -> Iterator[None]:
    """Inside, what transformers draws for a new head is the same every time; the process's own generator is left as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(HEAD_SEED)
        yield
