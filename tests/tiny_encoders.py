"""Tiny random encoders made from configurations, with tokenizers made on the spot."""

import re
import string
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from edgezo import api
from edgezo.config import make_config
from edgezo.runtime.lora import Lora
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.tune import tune

VOCABULARY = 320
TEXT = ["The film is great and the plot is terrible . It was great . It was terrible . good bad yes no", *tiny.TEXT[1:]] * 3
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": SMALL,
    # positions begin behind the padding's: 66 rows have room for 64 tokens
    "roberta": {**SMALL, "max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    "distilbert": {
        "vocab_size": VOCABULARY,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 48,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    },
    "albert": {**SMALL, "embedding_size": 16, "inner_group_num": 1},
    "electra": {**SMALL, "embedding_size": 16},
}


def make_tokenizer(name: str) -> Any:
    """RoBERTa's is a byte-level BPE whose mask takes the space before it; the others' is WordPiece in lower case."""
    return _byte_level() if name == "roberta" else _word_piece()


def _word_piece() -> Any:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word for text in TEXT for word in re.findall(r"\w+|[^\w\s]", text.lower())}
    pieces = dict.fromkeys([*special, *string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase), *sorted(words)])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}  # a trained one differs from time to time
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    around = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", around)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def _byte_level() -> Any:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    around = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> </s> $B </s>", around)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
    )


def make_model(name: str, head: str = "MaskedLM", seed: int = 0, **more: Any) -> Any:
    """A random model of one architecture, with the head of transformers' AutoModelFor..., or with none."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(name, **CONFIGS[name], **more)
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")
    model = auto.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():  # zeros and ones would hide what they are added to
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def save(folder: Path, name: str, head: str = "MaskedLM", **more: Any) -> Path:
    """Write a Hugging Face folder with model and tokenizer."""
    make_model(name, head, **more).save_pretrained(folder)
    make_tokenizer(name).save_pretrained(folder)
    return folder


def check_tuning(directory: Path, run: Path, lora: bool, **settings: Any) -> None:
    """A few steps lower the loss by 5 % or more, and the run's journal gives the very bits of what it tuned."""
    own = {"lr": 1e-2, "rank": 2, "steps": 60} if lora else {"lr": 2e-3, "steps": 50}
    common = {"start": "none", "eval_every": 25, "rule": "normalized", "directions": 1, "batch": 8}
    tuned = EdgeModel(directory, threads=1)
    result = tune(tuned, make_config(None, {**common, **own, **settings}), run)
    assert result.before is not None
    assert result.best is not None
    assert result.best.loss < 0.95 * result.before.loss
    assert api.evaluate(directory, settings["data"], run=run).evaluation == result.best
    replayed = EdgeModel(directory, threads=2, run=run, step="last")
    assert replayed.weights.keys() == tuned.weights.keys()
    for tensor, array in replayed.weights.items():
        assert array.tobytes() == tuned.weights[tensor].tobytes()
    if lora:
        assert isinstance(tuned.adapter, Lora)
        assert isinstance(replayed.adapter, Lora)
        assert replayed.adapter.b.tobytes() == tuned.adapter.b.tobytes()
        assert tuned.adapter.b.any()
