"""Handwritten digits: image classification on scikit-learn's copy of the UCI set (Alpaydin and Kaynak 1998)."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from pybatch.errors import unknown
from pybatch.workloads.base import Split, Workload, register

_SPLIT_SEED = 0  # of the permutation that splits the 1797 images
_TRAIN = 1437  # 80 %


@register
class Digits(Workload):
    """8 x 8 grey images of ten digits, pixels scaled to 0..1.

    1437 images to train and 360 to test, split by one fixed permutation; a batch is drawn uniformly with replacement.
    Models: "mlp" (64-64-10, the default) and "cnn" (two convolutions and two dense layers, after LeNet-5).
    """

    name = "digits"
    unit = "images"
    target: dict[str, float] = {"train": 0.1, "test": 0.2}  # noqa: RUF012
    learning_rate = 3e-3
    reference_batch = 32
    examples = _TRAIN
    models: ClassVar[tuple[str, ...]] = ("mlp", "cnn")

    def __init__(self, model: str | None = None) -> None:
        self.model_name = model or self.models[0]
        if self.model_name not in self.models:
            raise unknown("workload 'digits': model", self.model_name, self.models)

    def model(self) -> nn.Module:
        """A fresh model."""
        if self.model_name == "mlp":
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def batch(self, n: int, generator: torch.Generator, split: Split = "train") -> tuple[torch.Tensor, torch.Tensor]:
        """Images [n, 1, 8, 8] and labels [n]."""
        images, labels = _data()[split]
        chosen = torch.randint(len(labels), (n,), generator=generator)
        return images[chosen], labels[chosen]

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy, nats."""
        images, labels = batch
        return nn.functional.cross_entropy(model(images), labels)


@lru_cache(1)
def _data() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    from sklearn.datasets import load_digits  # slow to import, and only wanted here

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
    images = torch.tensor(pixels[order] / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8)  # 17 levels of grey
    classes = torch.tensor(labels[order], dtype=torch.int64)
    return {"train": (images[:_TRAIN], classes[:_TRAIN]), "test": (images[_TRAIN:], classes[_TRAIN:])}
