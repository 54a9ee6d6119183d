"""What transformers, PEFT and NumPy make of the same weights: references to compare with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiny
import torch

from edgezo.adapters import LoraTarget
from edgezo.config import make_config
from edgezo.runtime import noise
from edgezo.runtime.estimators.estimator import Estimate
from edgezo.runtime.examples import Example
from edgezo.runtime.lora import Lora
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.noise import Direction
from edgezo.runtime.objective import Objective
from edgezo.runtime.peft_folder import write_peft
from edgezo.runtime.prefix import Prefix
from edgezo.runtime.scoring import Pair, Sequences
from edgezo.runtime.tasks import Kind, Task

Numbers = npt.NDArray[np.float64]


def make_pairs(seed: int = 0, rows: int = 8) -> list[Pair]:
    """Unequal prompts, completions of one to three tokens."""
    random = np.random.default_rng(seed)
    return [(random.integers(4, 300, 3 + row).tolist(), random.integers(4, 300, 1 + row % 3).tolist()) for row in range(rows)]


def make_examples(rows: int, words: Sequence[int] = (1, 1), seed: int = 0) -> list[Example]:
    """Classification rows of unequal length; `words` says how many tokens each label word has."""
    random = np.random.default_rng(seed)
    labels = [random.integers(4, 300, length).tolist() for length in words]
    prompts = [random.integers(4, 300, random.integers(3, 12)).tolist() for _ in range(rows)]
    return [Example([(prompt, label) for label in labels], row % len(labels)) for row, prompt in enumerate(prompts)]


def make_objective(sequences: Sequences, kind: Kind = "classification", **settings: Any) -> Objective:
    """The default loss of rows of a kind."""
    return Objective(sequences, Task(kind), make_config(None, {"data": "no file", **settings}))


def network_scores(network: Any, pairs: Sequence[Pair]) -> list[Any]:
    """Summed log-probability of every completion by a torch model, one sequence at a time, as float64 tensors."""
    scores = []
    for prompt, completion in pairs:
        logits = network(input_ids=torch.tensor([prompt + completion])).logits[0].double()
        rows = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
        scores.append(rows[torch.arange(len(completion)), torch.tensor(completion)].sum())
    return scores


def network_log_probs(network: Any, pairs: Sequence[Pair]) -> Numbers:
    with torch.no_grad():
        return np.array([float(score) for score in network_scores(network, pairs)])


def network_loss(network: Any, examples: Sequence[Example]) -> Any:
    """Mean of -log softmax(s)[gold], a torch scalar."""
    losses = [-torch.log_softmax(torch.stack(network_scores(network, example.pairs)), 0)[example.gold] for example in examples]
    return torch.stack(losses).mean()


def edge_log_probs(model: EdgeModel, pairs: Sequence[Pair]) -> Numbers:
    """The same as `network_log_probs` by the edge model."""
    return np.array([part.sum() for part in Sequences(model).log_probs(pairs)])


def randomise(model: EdgeModel, seed: int = 1, rank: int = 3, alpha: float = 5.0) -> Lora | Prefix:
    """Give the model an adapter of random values that change its scores by nats."""
    random = np.random.default_rng(seed)
    if isinstance(model.adapter, Prefix):
        model.adapter.array[...] += 0.5 * random.standard_normal(model.adapter.array.shape)
        return model.adapter
    assert model.manifest.adapter is not None
    lora = Lora(model.manifest.adapter.targets, rank, alpha)
    lora.initialise(seed)
    lora.b[...] = 0.3 * random.standard_normal(lora.b.size)
    model.adapter = lora
    return lora


def write_adapter(model: EdgeModel, folder: Path) -> Path:
    """The model's adapter as a PEFT folder."""
    assert model.adapter is not None
    folder.mkdir()
    write_peft(model.adapter, model.manifest, folder)
    return folder


def peft_network(name: str, folder: Path) -> Any:
    """The tiny torch model with an adapter as PEFT reads it."""
    import peft

    return peft.PeftModel.from_pretrained(tiny.make_model(name), folder).eval()


def both_sides(estimates: Sequence[Estimate], eps: float) -> Numbers:
    """L(theta + eps z) and L(theta - eps z) of two-sided estimates, float64 [directions, 2]."""
    return np.array([[at.loss + eps * at.projected_grad, at.loss - eps * at.projected_grad] for at in estimates])


def outer_products(direction: Direction, name: str, shapes: Sequence[tuple[int, int]]) -> list[Numbers]:
    """z_i = r_i s_i^T of the matrices of one tensor, as docs/noise.md says: all r first, then all s."""
    heights, widths = (np.array(sizes) for sizes in zip(*shapes, strict=True))
    drawn = noise.signs(direction, noise.tensor_id(name), int(heights.sum() + widths.sum())).astype(np.float64)
    rows, columns = np.split(drawn, [heights.sum()])
    parts = zip(np.split(rows, heights.cumsum()[:-1]), np.split(columns, widths.cumsum()[:-1]), strict=True)
    return [np.outer(r, s) for r, s in parts]


def matrix_shapes(targets: Sequence[LoraTarget], rank: int) -> dict[str, list[tuple[int, int]]]:
    """Shapes of A^T and B^T target by target, by the name of their tensor."""
    return {
        "lora_A": [(target.in_features, rank) for target in targets],
        "lora_B": [(rank, target.out_features) for target in targets],
    }
