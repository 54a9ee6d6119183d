"""What tests of exporting share: sources made by hand, tensors as they lie in their files, and refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import tiny
import torch

from edgezo.errors import EdgezoError, ExportError
from edgezo.export import export_model
from edgezo.manifest import Tensor


def stored(directory: Path, tensor: Tensor) -> npt.NDArray[Any]:
    """A tensor as it lies in its file."""
    with open(directory / tensor.file, "rb") as file:
        file.seek(tensor.offset)
        return np.frombuffer(file.read(tensor.nbytes), np.dtype(tensor.dtype).newbyteorder("<")).reshape(tensor.shape)


def refusal(model: str | Path, output: Path, kind: type[EdgezoError] = ExportError, **options: Any) -> str:
    """The message of a refused export: one line, and nothing appears beside `output`."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(kind) as caught:
        export_model(str(model), output, **options)
    assert sorted(output.parent.iterdir()) == before
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def save_changed(folder: Path, change: Callable[[Any], None], name: str = "llama") -> Path:
    """A source folder whose torch model was changed."""
    model = tiny.make_model(name)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


def write_gguf(path: Path, model: Any) -> Path:
    """The tiny Llama as llama.cpp's converter writes it: float32, rotary halves interleaved, a gpt2-type tokenizer without BOS."""
    config, bpe = model.config, json.loads(tiny.make_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads if "k_proj" in name else 0
        if heads:
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
