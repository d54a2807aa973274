"""A workload from what a training script has already: a model, a Dataset, a loss, its own optimizer.

python examples/from_dataset.py
pybatch bench --workload examples/from_dataset.py:Digits --time-budget 30
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

import pybatch


def digits() -> tuple[Dataset, Dataset]:
    """Training and held-out images with their labels."""
    images, labels = load_digits(return_X_y=True)
    whole = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0)).tolist()
    return Subset(whole, order[:1437]), Subset(whole, order[1437:])


class Digits(pybatch.Workload):
    """Examples are drawn with replacement, so that a batch may exceed the data set."""

    name, unit = "digits of a Dataset", "images"
    learning_rate = 3e-3

    def __init__(self) -> None:
        train, test = digits()
        self.parts = {"train": train, "test": test}
        self.examples = len(train)  # type: ignore[arg-type]

    def model(self) -> nn.Module:
        """Images [n, 64] to logits [n, 10]."""
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def batch(self, n: int, generator: torch.Generator, split: str = "train") -> list[torch.Tensor]:
        """n images and labels."""
        part = self.parts[split]
        chosen = torch.randint(len(part), (n,), generator=generator)  # type: ignore[arg-type]
        return default_collate([part[i] for i in chosen.tolist()])

    def loss(self, model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        """Cross-entropy, the mean over the images."""
        images, labels = batch
        return nn.functional.cross_entropy(model(images), labels)


if __name__ == "__main__":
    seconds = float(sys.argv[1]) if sys.argv[1:] else 6.0
    capacity = pybatch.measure_capacity(Digits(), batches=[8, 64, 512], time_budget=seconds)
    noise = pybatch.measure_noise(Digits(), time_budget=seconds)
    print(pybatch.advise(capacity, noise))
