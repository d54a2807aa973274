"""A workload from what a training script has already: a model, two Datasets, a loss, its optimizer and its workers.

python examples/from_dataset.py                 # or with the seconds that each part may take
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

import pybatch


def digits() -> tuple[Dataset, Dataset]:
    """Training and held-out images with their labels."""
    images, labels = load_digits(return_X_y=True)
    whole = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0)).tolist()
    return Subset(whole, order[:1437]), Subset(whole, order[1437:])


def network() -> nn.Module:
    """Images [n, 64] to logits [n, 10]."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def workload() -> pybatch.Workload:
    """The same for pybatch: examples are drawn with replacement, so that a batch may exceed the data set."""
    train, test = digits()
    return pybatch.Workload.from_parts(
        model=network,
        train=train,
        test=test,
        loss=nn.CrossEntropyLoss(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        unit="images",
    )


if __name__ == "__main__":
    seconds = float(sys.argv[1]) if sys.argv[1:] else 6.0
    capacity = pybatch.measure_capacity(workload(), batches=[8, 64, 512], time_budget=seconds)
    noise = pybatch.measure_noise(workload(), time_budget=seconds)
    print(pybatch.advise(capacity, noise))
