"""Models for images: classifiers and segmenters, a few lines each. No BatchNorm: an example's gradient is its own."""

from __future__ import annotations

import math

import torch
from torch import nn

CLASSIFIERS = ("mlp", "cnn", "resnet")
SEGMENTERS = ("unet", "dilated")


def classifier(model: str, shape: tuple[int, int, int], classes: int, width: int) -> nn.Module:
    """Images [n, channels, side, side] to logits [n, classes].

    Args:
        model: "mlp" (one hidden layer of `width`), "cnn" (two convolutions and two dense layers, after LeNet-5) or
            "resnet" (three stages of two residual blocks, after He et al. 2016, with group norm).
        shape: channels, height and width of an image; both sides at least 4.
        classes: how many.
        width: of the hidden layer; convolutions have a quarter of it and up.
    """
    channels, height, side = shape
    if model == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), width), nn.ReLU(), nn.Linear(width, classes))
    first = max(1, width // 4)
    if model == "cnn":
        return nn.Sequential(
            nn.Conv2d(channels, first, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, 2 * first, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * first * (height // 4) * (side // 4), width),
            nn.ReLU(),
            nn.Linear(width, classes),
        )
    blocks: list[nn.Module] = []
    before = first
    for stage in range(3):
        for block in range(2):
            after = first * 2**stage
            blocks.append(Residual(before, after, stride=2 if stage and not block else 1))
            before = after
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(channels, first, 3, padding=1), *blocks, norm(before), nn.ReLU(), *pool,
                         nn.Linear(before, classes))  # fmt: skip


def segmenter(model: str, channels: int, classes: int, width: int) -> nn.Module:
    """Images [n, channels, side, side] to logits per pixel [n, classes, side, side]; side a multiple of 4.

    Args:
        model: "unet" (three levels, after Ronneberger et al. 2015) or "dilated" (residual blocks at full resolution
            with dilations 1, 2, 4 and 8, after Yu et al. 2017).
        channels, classes: how many.
        width: channels of the first level.
    """
    if model == "unet":
        return UNet(channels, classes, width)
    blocks = [Residual(width, width, dilation=d) for d in (1, 2, 4, 8)]
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), *blocks, norm(width), nn.ReLU(),
                         nn.Conv2d(width, classes, 1))  # fmt: skip


def norm(channels: int) -> nn.GroupNorm:
    """Group norm (Wu and He 2018) of at most eight groups."""
    return nn.GroupNorm(math.gcd(8, channels), channels)


class Residual(nn.Module):
    """Two 3 x 3 convolutions, each after norm and ReLU, added to the input (He et al. 2016, pre-activation)."""

    def __init__(self, before: int, after: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(before), norm(after)
        self.conv1 = nn.Conv2d(before, after, 3, stride, dilation, dilation, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, dilation, dilation, bias=False)
        fits = stride == 1 and before == after
        self.skip: nn.Module = nn.Identity() if fits else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, before, h, w] to [n, after, h / stride, w / stride]."""
        y = self.conv1(torch.relu(self.norm1(x)))
        y = self.conv2(torch.relu(self.norm2(y)))
        total: torch.Tensor = self.skip(x) + y
        return total


class UNet(nn.Module):
    """Down twice and up again; each level's features are kept for the way up."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.down1, self.down2 = _pair(channels, width), _pair(width, 2 * width)
        self.bottom = _pair(2 * width, 4 * width)
        self.up2, self.up1 = _pair(6 * width, 2 * width), _pair(3 * width, width)
        self.pool, self.enlarge = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, channels, h, w] to [n, classes, h, w]."""
        first = self.down1(x)
        second = self.down2(self.pool(first))
        y = self.bottom(self.pool(second))
        y = self.up2(torch.cat([self.enlarge(y), second], 1))
        y = self.up1(torch.cat([self.enlarge(y), first], 1))
        logits: torch.Tensor = self.head(y)
        return logits


def _pair(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [nn.Conv2d(channels, after, 3, padding=1), norm(after), nn.ReLU()]
    return nn.Sequential(*layers)
