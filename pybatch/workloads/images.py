"""Image classification: what the workloads on digits, MNIST, CIFAR-10 and image folders have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from pybatch.workloads.base import Split, Workload, check_dial, chosen_model
from pybatch.workloads.vision import CLASSIFIERS, classifier

_NOISE_SEED = 0  # of the labels that are replaced
_LEAST_SIDE = 8  # pixels: models halve it twice
_CHUNK = 1024  # images resized at a time


@dataclass(frozen=True)
class Images:
    """Pixels [n, channels, side, side], float32 in 0..1 or uint8 in 0..255, and labels [n] of int64."""

    pixels: torch.Tensor
    labels: torch.Tensor


class ImageClassification(Workload):
    """Images in memory, drawn uniformly with replacement; cross-entropy of a small classifier.

    Dials, the same for all: `subset`, the share of the training images that are used (the first ones, in the order of
    the set); `label_noise`, the share of training labels replaced by another class, once and for all; `resolution`,
    pixels a side; `width` of the model.
    """

    unit = "images"
    models: ClassVar[tuple[str, ...]] = CLASSIFIERS
    dials: ClassVar[dict[str, str]] = {
        "subset": "share of the training images used, above 0 to 1 (1)",
        "label_noise": "share of training labels replaced by another class, 0 to 1 (0)",
        "resolution": "pixels a side, 8 or more (that of the images)",
        "width": "of the hidden layer; convolutions have a quarter and up (64), resnet50's all of it and up",
    }
    sizes: ClassVar[dict[str, dict[str, int | str]]] = {
        "tiny": {},
        "base": {"model": "resnet50", "resolution": 224},  # pixels of the paper's ImageNet crops
    }
    classes: int = 10

    def _prepare(
        self,
        model: str | None,
        data: dict[str, Images],
        subset: float,
        label_noise: float,
        resolution: int | None,
        width: int,
    ) -> None:
        """Take the arguments of the constructor, checked, and the data they act on."""
        self.model_name = chosen_model(self.name, model, self.models)
        check_dial(self.name, "subset", subset, 1e-9, 1.0, "a share above 0, at most 1")
        check_dial(self.name, "label_noise", label_noise, 0.0, 1.0, "a share from 0 to 1")
        check_dial(self.name, "width", width, 4, 65_536, "a whole number from 4 to 65536")
        if resolution is not None:
            check_dial(self.name, "resolution", resolution, _LEAST_SIDE, 4096, f"{_LEAST_SIDE} to 4096 pixels")
        self.width = width
        train, test = (data[split] for split in ("train", "test"))
        self.side = resolution or train.pixels.shape[-1]
        if self.side < train.pixels.shape[-1]:  # what is enlarged is enlarged when drawn: the set stays small
            train, test = (Images(_resized(part.pixels, self.side), part.labels) for part in (train, test))
        kept = max(1, round(subset * len(train.labels)))
        labels = _noisy(train.labels, label_noise, self.classes)[:kept]
        self.images = {"train": Images(train.pixels[:kept], labels), "test": test}
        self.examples = kept
        self.options = {"subset": subset, "label_noise": label_noise, "width": width}
        self.options["resolution"] = self.side

    def model(self) -> nn.Module:
        """A fresh model."""
        shape = (self.images["train"].pixels.shape[1], self.side, self.side)
        return classifier(self.model_name or self.models[0], shape, self.classes, self.width)

    def batch(self, n: int, generator: torch.Generator, split: Split = "train") -> tuple[torch.Tensor, torch.Tensor]:
        """Images [n, channels, side, side] with pixels in 0..1, and labels [n]."""
        images = self.images[split]
        chosen = torch.randint(len(images.labels), (n,), generator=generator)
        pixels = _resized(images.pixels[chosen], self.side)
        return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels, images.labels[chosen]

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy, nats."""
        pixels, labels = batch
        return nn.functional.cross_entropy(model(pixels), labels)


def _noisy(labels: torch.Tensor, share: float, classes: int) -> torch.Tensor:
    """Labels of which this share, drawn with a fixed seed, is replaced by one of the other classes."""
    generator = torch.Generator().manual_seed(_NOISE_SEED)
    wrong = torch.rand(len(labels), generator=generator) < share
    off = torch.randint(1, max(2, classes), (len(labels),), generator=generator)
    return torch.where(wrong, (labels + off) % classes, labels)


def _resized(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Images of this many pixels a side, by bilinear interpolation with antialiasing."""
    if pixels.shape[-2:] == (side, side):
        return pixels
    parts = []
    for part in torch.split(pixels, _CHUNK):
        new = nn.functional.interpolate(part.float(), (side, side), mode="bilinear", antialias=True)
        parts.append(new if pixels.dtype == torch.float32 else new.round().clamp(0, 255).to(torch.uint8))
    return torch.cat(parts)
