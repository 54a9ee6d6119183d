"""LoRA whose A are principal directions of every layer's inputs, not random ones: a PEFT folder for `edgezo tune --init`, and what it changes.

    python -m examples.bench.principal SOURCE EDGE ADAPTER --data DATA/sst2/train.jsonl --task sst2
    edgezo tune EDGE --init ADAPTER --data DATA/sst2/train.jsonl --valid DATA/sst2/validation.jsonl --task sst2 --start none --steps 40 -o RUN

A row of A is an eigenvector of the covariance of a linear layer's inputs over all tokens of the first training rows' prompts, those of the largest
eigenvalues, sqrt(1/3) long as a row drawn uniformly in +-1/sqrt(in_features) is; B is zero. Needs PyTorch and PEFT (the extra `bench`).
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from edgezo.recipe import task_settings
from examples.bench.backpropagation import lora_network, read_examples

NORM = 3**-0.5


class Moments:
    """Sums over the inputs of one layer, float64."""

    def __init__(self, width: int) -> None:
        self.count, self.total, self.products = 0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)

    def add(self, layer: Any, given: tuple[torch.Tensor, ...]) -> None:
        """A forward hook: one more batch of inputs, [..., width]."""
        rows = given[0].detach().reshape(-1, given[0].shape[-1]).double()
        self.count += len(rows)
        self.total += rows.sum(dim=0)
        self.products += rows.T @ rows

    def principal(self, rank: int) -> tuple[torch.Tensor, float]:
        """[rank, width], orthonormal, the largest eigenvalue first; and their share of the variance."""
        mean = self.total / self.count
        values, vectors = torch.linalg.eigh(self.products / self.count - torch.outer(mean, mean))
        return vectors[:, -rank:].flip(1).T, float(values[-rank:].sum() / values.sum())


def main() -> None:
    """Read the rows, write the adapter, tell how much of the variance its directions hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="Hugging Face folder or .gguf file")
    parser.add_argument("edge", type=Path, help="edge model of it with --adapter lora, which reads the rows")
    parser.add_argument("adapter", type=Path, help="folder to write")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", required=True, help="recipe that reads the rows")
    parser.add_argument("--rows", type=int, default=96)
    options = parser.parse_args()
    network = lora_network(options.source).eval()
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, LoraLayer)}
    found = {name: Moments(layer.in_features) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(functools.partial(Moments.add, found[name]))
    _, examples = read_examples(options.edge, options.data, task_settings(options.task))
    with torch.no_grad():
        for example in examples[: options.rows]:
            network(input_ids=torch.tensor([example.pairs[0][0]]))
        shares = []
        for name, layer in layers.items():
            weight = layer.lora_A["default"].weight
            directions, share = found[name].principal(len(weight))
            weight.copy_(NORM * directions)
            shares.append(share)
    network.save_pretrained(options.adapter)
    print(
        f"{len(layers)} layers, {found[name].count} tokens; share of the variance {min(shares):.2f} to {max(shares):.2f}, mean {sum(shares) / len(shares):.2f}"
    )


if __name__ == "__main__":
    main()
