"""What edgezo is measured against: the same rows in PyTorch, float32. Each function makes one step of one system.

Only the logits of the last position are computed (`logits_to_keep=1`), as the scoring graph does, which the published code does not do; MeZO
is measured both ways.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from edgezo.export.quiet import quiet
from examples.bench.measure import Step

LABELS = (10, 20)
EPS, LR = 1e-3, 1e-6


def load(folder: str, threads: int) -> torch.nn.Module:
    """The model of a Hugging Face folder in evaluation mode."""
    torch.set_num_threads(threads)
    with quiet():
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def with_lora(model: torch.nn.Module) -> Any:
    """LoRA of rank 8 at all linear layers; the rest is frozen."""
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")).eval()  # type: ignore[arg-type]


def make_loss(model: Any, rows: int, tokens: int, keep: int = 1) -> Callable[[], torch.Tensor]:
    """Mean cross-entropy over two label words after random rows; logits of the last `keep` positions are computed, 0 for all."""
    ids = torch.randint(0, model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
    gold = torch.arange(rows) % 2

    def loss() -> torch.Tensor:
        logits = model(input_ids=ids, logits_to_keep=keep, use_cache=False).logits[:, -1]
        return torch.nn.functional.cross_entropy(logits[:, list(LABELS)], gold)

    return loss


def two_forwards(folder: str, threads: int, rows: int, tokens: int) -> Step:
    """Inference: what a two-sided step would cost if noise were free."""
    loss = make_loss(load(folder, threads), rows, tokens)

    def step(number: int) -> None:
        with torch.inference_mode():
            loss()
            loss()

    return step


def mezo(folder: str, threads: int, rows: int, tokens: int, lora: bool, keep: int) -> Step:
    """Malladi et al. 2023, algorithm 1, as published: z is drawn anew from the step's seed for each of the four passes over the weights."""
    model = load(folder, threads)
    model = with_lora(model) if lora else model
    loss = make_loss(model, rows, tokens, keep)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def noise(seed: int) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        torch.manual_seed(seed)
        for parameter in parameters:
            yield parameter, torch.normal(mean=0, std=1, size=parameter.size(), dtype=parameter.dtype)

    def perturb(seed: int, factor: float) -> None:
        for parameter, z in noise(seed):
            parameter.data = parameter.data + factor * z * EPS

    def step(number: int) -> None:
        with torch.inference_mode():
            perturb(number, 1)
            plus = loss()
            perturb(number, -2)
            minus = loss()
            perturb(number, 1)
            projected_grad = ((plus - minus) / (2 * EPS)).item()
            for parameter, z in noise(number):
                parameter.data = parameter.data - LR * projected_grad * z

    return step


def adamw(folder: str, threads: int, rows: int, tokens: int, lora: bool, checkpointing: bool) -> Step:
    """Backpropagation and AdamW."""
    model: Any = load(folder, threads)
    model = with_lora(model) if lora else model
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    model.train()
    loss = make_loss(model, rows, tokens)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=LR)

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step
