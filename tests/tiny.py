"""Tiny random models made from configurations, with a tokenizer trained on the spot. `python tests/tiny.py FOLDER` writes a Llama."""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 320
TEXT = ["the film is great and the plot is terrible", "user assistant system", "Question: what is the capital of France? Answer: Paris"] * 3
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "tie_word_embeddings": True},
    "llama-untied": {**SMALL, "tie_word_embeddings": False},
    "qwen2": {**SMALL, "tie_word_embeddings": True},
    "qwen3": {**SMALL, "tie_word_embeddings": True, "head_dim": 8},
    "gemma3_text": {**SMALL, "head_dim": 8, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {**SMALL, "tie_word_embeddings": True, "sliding_window": 12},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "opt": {
        **{
            name: SMALL[name]
            for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        },
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "init_std": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    },
}


def make_tokenizer() -> Any:
    """A byte-level BPE with a few special tokens and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1], pad_token=special[1]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(name: str, seed: int = 0) -> Any:
    """A random model of one architecture, float32, in evaluation mode."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(name.removesuffix("-untied"), **CONFIGS[name])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def save(folder: Path, name: str = "llama") -> Path:
    """Write a Hugging Face folder with model and tokenizer."""
    make_model(name).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


if __name__ == "__main__":
    save(Path(sys.argv[1]))
