"""The upper line of examples/bench/convergence.py: LoRA with AdamW by backpropagation in PyTorch, on the same rows with the same loss.

Of label words the cross-entropy of candidates, of choices the likelihood of the right one's tokens.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from edgezo.config import make_config
from edgezo.export.quiet import quiet
from edgezo.runtime.corpus import read_data
from edgezo.runtime.dataset import task_of, tokenize_data
from edgezo.runtime.examples import Example
from edgezo.runtime.model import EdgeModel

LR, BATCH, ROW_COST = 5e-4, 16, 3  # a row's forward and backward cost about three forwards


def learn(source: Path, edge: Path, files: Any, budgets: list[int], seed: int) -> dict[str, Any]:
    """Test accuracy by rows of forward, and seconds of learning.

    Args:
        source: Hugging Face folder or .gguf file.
        edge: edge model of it, which reads the rows.
        files: training, validation and test rows, and how they are read.
        budgets: rows of forward at which to measure.
        seed: of LoRA's A and of the order of rows.
    """
    torch.manual_seed(seed)
    network, pad = lora_network(source), 0
    (choices, train), (_, test) = (read_examples(edge, path, files.settings) for path in (files.train, files.test))
    optimizer = torch.optim.AdamW([parameter for parameter in network.parameters() if parameter.requires_grad], lr=LR)
    order = np.concatenate(
        [np.random.default_rng([seed, epoch]).permutation(len(train)) for epoch in range(1 + budgets[-1] // (ROW_COST * len(train)))]
    )
    points, seconds, used = {}, 0.0, 0
    for budget in budgets:
        begun = time.monotonic()
        network.train()
        while ROW_COST * (used + BATCH) <= budget:
            batch = [train[row] for row in order[used : used + BATCH]]
            used += BATCH
            loss = _loss(network, batch, choices, pad)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        seconds += time.monotonic() - begun
        points[budget] = _accuracy(network, test, choices, pad)
    return {"points": points, "seconds": seconds}


def lora_network(source: Path) -> Any:
    """A Hugging Face folder or .gguf file with LoRA of rank 8 at all linear layers, by PEFT."""
    where = {"gguf_file": source.name} if source.suffix == ".gguf" else {}
    with quiet():
        network = AutoModelForCausalLM.from_pretrained(source.parent if where else source, dtype=torch.float32, **where)
    return get_peft_model(network, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def read_examples(edge: Path, path: Path, settings: dict[str, Any]) -> tuple[bool, list[Example]]:
    """Whether rows are of choices, and the rows."""
    model, config = EdgeModel(edge), make_config(None, {"data": str(path)}, None, settings)
    read = read_data(str(path))
    task = task_of(read, config)
    return task.kind == "choice", list(tokenize_data(model, config, task, str(path), read).examples)


def _loss(network: Any, batch: list[Example], choices: bool, pad: int) -> torch.Tensor:
    if choices:
        right: list[Any] = [example.pairs[example.gold] for example in batch]
        return -_sums(network, right, pad).sum() / sum(len(completion) for _, completion in right)
    return torch.nn.functional.cross_entropy(_scores(network, batch, choices, pad), torch.tensor([example.gold for example in batch]))


def _scores(network: Any, examples: list[Example], choices: bool, pad: int) -> torch.Tensor:
    """Log-probabilities [rows, candidates], summed over tokens, of choices their mean, as edgezo scores them."""
    pairs: list[Any] = [pair for example in examples for pair in example.pairs]
    if not choices and all(len(completion) == 1 for _, completion in pairs):  # candidates of one token share their prompt's forward
        prompts = [example.pairs[0][0] for example in examples]
        ids, ends = _padded(prompts, pad), torch.tensor([len(prompt) - 1 for prompt in prompts])
        logits = network(input_ids=ids, attention_mask=_mask(prompts), use_cache=False).logits[torch.arange(len(prompts)), ends]
        targets = torch.tensor([[completion[0] for _, completion in example.pairs] for example in examples])
        return torch.log_softmax(logits, dim=-1).gather(1, targets)
    lengths = torch.tensor([len(completion) if choices else 1 for _, completion in pairs])
    return (_sums(network, pairs, pad) / lengths).reshape(len(examples), -1)


def _sums(network: Any, pairs: list[Any], pad: int) -> torch.Tensor:
    """Summed log-probabilities of the tokens of each completion."""
    texts = [[*prompt, *completion] for prompt, completion in pairs]
    logits = torch.log_softmax(network(input_ids=_padded(texts, pad), attention_mask=_mask(texts), use_cache=False).logits, dim=-1)
    sums = [
        logits[row, range(len(prompt) - 1, len(prompt) + len(completion) - 1), completion].sum()
        for row, (prompt, completion) in enumerate(pairs)
    ]
    return torch.stack(sums)


def _padded(texts: list[list[int]], pad: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True, padding_value=pad)


def _mask(texts: list[list[int]]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.ones(len(text), dtype=torch.long) for text in texts], batch_first=True)


@torch.no_grad()
def _accuracy(network: Any, examples: list[Example], choices: bool, pad: int) -> float:
    network.eval()
    inorder = sorted(examples, key=lambda example: len(example.pairs[0][0]))
    right = [
        (
            _scores(network, inorder[first : first + BATCH], choices, pad).argmax(dim=1).numpy()
            == [example.gold for example in inorder[first : first + BATCH]]
        )
        for first in range(0, len(inorder), BATCH)
    ]
    return float(np.concatenate(right).mean())
