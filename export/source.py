"""What `edgezo export MODEL` accepts, loaded: a hub id, a Hugging Face folder, a .gguf file, a folder with model.onnx."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgezo.errors import ConfigError, ExportError, first_line
from edgezo.export.decoder import EXPORTED, Decoder
from edgezo.export.encoder import Network, family_of, fix_token_types, load_encoder, usable_context
from edgezo.export.quiet import quiet
from edgezo.manifest import Origin, Pooling
from edgezo.storage import is_run

Logits = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]]


@dataclass
class Source:
    """A loaded source: the traced model to convert and the reference to check the result against.

    `logits(tokens)` runs the source on int64 [batch, sequence] without padding and returns float32 [batch, sequence, vocabulary], of a
    classifier [batch, 1, classes]. `new_weights` are those of a head that its files lack, `pooling` is what that head reads, None for the
    architecture's own.
    `shares_weights` says that it reads the decoder's own arrays, so that a change of these is a change of the source.
    """

    origin: Origin
    decoder: Decoder
    logits: Logits
    tokenizer: Any
    config: Any
    generation_eos: list[int] = field(default_factory=list)
    shares_weights: bool = False
    classes: list[str] = field(default_factory=list)
    new_weights: list[str] = field(default_factory=list)
    pooling: Pooling | None = None


def load_source(model: str, revision: str | None = None, classes: list[str] | None = None, pooling: str | None = None) -> Source:
    """Load MODEL; `classes` are the names of a head of classes, made new where the model has none, `pooling` is what a new one reads.

    Raises:
        ExportError: it does not exist, cannot be read, or is neither a decoder-only causal language model nor an encoder.
    """
    path = Path(model).expanduser()
    if revision is not None and path.exists():
        raise ConfigError(f"--revision {revision}: {model} is a local file or folder, only hub ids have revisions; leave it out")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ExportError(
                f"{model}: a file that is not .gguf; give a .gguf file, a Hugging Face folder, a folder with model.onnx, or a hub id"
            )
        return _from_torch(str(path.parent.resolve()), model, {"gguf_file": path.name}, None, classes, pooling)
    if path.is_dir():
        if (path / "model.onnx").is_file():
            from edgezo.export.onnx_folder import load_onnx_folder

            if classes is not None:
                raise ConfigError(
                    f"--classes: {model} is a model.onnx, which has its head already; leave it out, or give the Hugging Face folder"
                )
            return load_onnx_folder(path)
        if (path / "manifest.json").is_file():
            raise ExportError(f"{model}: is an edge model already; give the Hugging Face model or .gguf file it was exported from")
        if is_run(path):
            raise ExportError(
                f"{model}: is a run; give the model it was tuned from, or what edgezo merge DIR {model} --format hf -o FOLDER makes"
            )
        if not (path / "config.json").is_file():
            raise ExportError(f"{model}: a folder with neither config.json nor model.onnx; it is no Hugging Face or optimum model")
        return _from_torch(str(path), model, {}, None, classes, pooling)
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or model.endswith((".gguf", ".onnx")):
        raise ExportError(f"{model}: no such file or folder")
    return _from_torch(model, model, {}, revision, classes, pooling)


def _from_torch(
    location: str, shown: str, keywords: dict[str, Any], revision: str | None, classes: list[str] | None, pooling: str | None
) -> Source:
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from edgezo.export.trace import trace_decoder

    where = {**keywords, "revision": revision} if revision else keywords
    try:
        with quiet():
            config = AutoConfig.from_pretrained(location, **where)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, struct.error, ... by file kind
        if not Path(location).exists():
            raise ExportError(
                f"{shown}: no such file or folder here, and no such model on the hub or the hub cannot be reached ({first_line(error)})"
            ) from error
        raise ExportError(f"{shown}: transformers cannot read it: {first_line(error)}; download or convert it again") from error
    if getattr(config, "is_encoder_decoder", False):
        raise ExportError(f"{shown}: {config.model_type} is an encoder-decoder; edgezo exports {EXPORTED}")
    family = family_of(config, classes, shown)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(location, use_fast=True, **where)
    except Exception as error:
        reason = f"its tokenizer (tokenizer.json beside the weights) cannot be loaded: {first_line(error)}"
        raise ExportError(f"{shown}: transformers cannot use it: {reason}") from error
    if family == "causal":
        loaded = _load_causal(location, shown, where)
    else:
        loaded = load_encoder(location, shown, config, family, where, classes, pooling)
    network = loaded.model
    if not tokenizer.is_fast:
        raise ExportError(f"{shown}: its tokenizer has no fast version (tokenizer.json), which the device needs")
    if "gguf_file" in keywords:
        _mend_gguf_tokenizer(tokenizer, Path(location) / keywords["gguf_file"])
    if family == "masked" and tokenizer.mask_token_id is None:
        raise ExportError(f"{shown}: its tokenizer has no mask token, which a masked language model needs; download the tokenizer again")
    decoder = trace_decoder(network, family)
    fix_token_types(decoder)
    origin = Origin(
        id=_name_of(location, shown),
        revision=revision or getattr(config, "_commit_hash", None),
        license=_license(location, keywords.get("gguf_file")),
        family=family,
        **{**sizes(network.config), **({"context_length": room} if family != "causal" and (room := usable_context(network)) else {})},
    )
    arguments = {"use_cache": False} if family == "causal" else {}

    def logits(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        with torch.no_grad():
            result: npt.NDArray[np.float32] = network(torch.from_numpy(tokens), **arguments).logits.float().numpy()
        return result[:, None] if family == "classifier" else result

    eos = getattr(getattr(network, "generation_config", None), "eos_token_id", None)
    eos_ids = eos if isinstance(eos, list) else [eos] if eos is not None else []
    return Source(
        origin,
        decoder,
        logits,
        tokenizer,
        network.config,
        eos_ids,
        shares_weights=True,
        classes=loaded.classes,
        new_weights=loaded.new_weights,
        pooling=loaded.pooling,
    )


def _load_causal(location: str, shown: str, where: dict[str, Any]) -> Network:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32, low_cpu_mem_usage=True, **where)
    except Exception as error:
        raise ExportError(f"{shown}: transformers cannot load it: {first_line(error)}") from error
    return Network(model.eval())


def sizes(config: Any) -> dict[str, Any]:
    """The facts of a transformers configuration that the manifest records."""
    text = config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 2048
    return {
        "model_type": text.model_type,
        "context_length": int(context),
        "vocab_size": int(text.vocab_size),
        "hidden_size": int(text.hidden_size),
    }


def save_tokenizer(source: Source, directory: Path) -> tuple[str | None, dict[str, str]]:
    """Write tokenizer.json and the chat template; returns the template's file name and the special tokens it may name."""
    with tempfile.TemporaryDirectory() as folder:
        source.tokenizer.save_pretrained(folder)
        # neither truncation nor padding: the runtime decides both, row by row
        saved = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
    saved["truncation"] = saved["padding"] = None
    (directory / "tokenizer.json").write_text(json.dumps(saved, ensure_ascii=False), encoding="utf-8")
    special = {name: str(value) for name, value in source.tokenizer.special_tokens_map.items() if isinstance(value, str)}
    template = source.tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        return None, special
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return "chat_template.jinja", special


def _mend_gguf_tokenizer(tokenizer: Any, path: Path) -> None:
    """Take the special tokens from the file: transformers 4.57 takes BOS for EOS and puts it before every text, whatever the file says."""
    from gguf import GGUFReader
    from tokenizers.processors import TemplateProcessing

    facts = {
        name.removeprefix("tokenizer.ggml."): field.contents()
        for name, field in GGUFReader(path).fields.items()
        if name.startswith("tokenizer.ggml.") and not name.endswith((".tokens", ".merges", ".scores", ".token_type"))
    }
    for kind, key in (("bos_token", "bos_token_id"), ("eos_token", "eos_token_id"), ("pad_token", "padding_token_id")):
        if key in facts:
            setattr(tokenizer, kind, tokenizer.convert_ids_to_tokens(int(facts[key])))
    # what llama.cpp does with a file that does not say
    leads = facts.get("add_bos_token", facts.get("model") != "gpt2" or str(facts.get("pre", "")).startswith("llama"))
    around = {"bos_token": leads, "eos_token": facts.get("add_eos_token", False)}
    put = {kind: str(getattr(tokenizer, kind)) for kind, wanted in around.items() if wanted and getattr(tokenizer, kind) is not None}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*([put["bos_token"]] if "bos_token" in put else []), "$A", *([put["eos_token"]] if "eos_token" in put else [])],
        pair=["$A", "$B:1"],
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in put.values()],
    )


def _name_of(location: str, shown: str) -> str:
    """A hub id as given; for local files their own name, never a path of this machine."""
    return Path(shown).name if Path(shown).exists() else location


def _license(location: str, gguf_file: str | None) -> str | None:
    """The licence that a .gguf file or a model card states, when there is one."""
    if gguf_file is not None:
        from gguf import GGUFReader

        field = GGUFReader(Path(location) / gguf_file).fields.get("general.license")
        return str(field.contents()) if field is not None else None
    from transformers.utils import cached_file

    try:
        card = cached_file(location, "README.md")
    except OSError:  # no card, or the hub cannot be reached any more
        return None
    for line in Path(card).read_text(encoding="utf-8", errors="replace").splitlines()[:60] if card else []:
        if line.startswith("license:"):
            return line.split(":", 1)[1].strip() or None
    return None
