"""Handwritten digits: image classification on scikit-learn's copy of the UCI set (Alpaydin and Kaynak 1998)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from pybatch.workloads.base import register
from pybatch.workloads.images import ImageClassification, Images

_SPLIT_SEED = 0  # of the permutation that splits the 1797 images
_TRAIN = 1437  # 80 %


@register
class Digits(ImageClassification):
    """8 x 8 grey images of ten handwritten digits, pixels scaled to 0..1.

    1437 images to train and 360 to test, split by one fixed permutation; a batch is drawn uniformly with replacement.
    Models: "mlp" (64-64-10, the default), "cnn" (two convolutions and two dense layers, after LeNet-5), "resnet",
    "resnet50" (He et al. 2016 with group norm). --size base is resnet50 on 224 x 224 pixels.
    """

    name = "digits"
    target: dict[str, float] = {"train": 0.1, "test": 0.2}  # noqa: RUF012
    learning_rate = 3e-3
    reference_batch = 32

    def __init__(
        self,
        model: str | None = None,
        *,
        subset: float = 1.0,
        label_noise: float = 0.0,
        resolution: int | None = None,
        width: int = 64,
    ) -> None:
        self._prepare(model, load(), subset, label_noise, resolution, width)


@lru_cache(1)
def load() -> dict[str, Images]:
    """The images [n, 1, 8, 8] of both splits, in 0..1."""
    from sklearn.datasets import load_digits  # slow to import, and only wanted here

    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
    images = torch.tensor(pixels[order] / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8)  # 17 levels of grey
    classes = torch.tensor(labels[order], dtype=torch.int64)
    return {"train": Images(images[:_TRAIN], classes[:_TRAIN]), "test": Images(images[_TRAIN:], classes[_TRAIN:])}
