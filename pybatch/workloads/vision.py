"""Models for images: classifiers and segmenters, a few lines each. No BatchNorm: an example's gradient is its own."""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn

CLASSIFIERS = ("mlp", "cnn", "resnet", "resnet50")
SEGMENTERS = ("unet", "dilated")


def classifier(model: str, shape: tuple[int, int, int], classes: int, width: int) -> nn.Module:
    """Images [n, channels, side, side] to logits [n, classes].

    Args:
        model: "mlp" (one hidden layer of `width`), "cnn" (two convolutions and two dense layers, after LeNet-5),
            "resnet" (three stages of two residual blocks, after He et al. 2016, with group norm) or "resnet50".
        shape: channels, height and width of an image; both sides at least 4.
        classes: how many.
        width: of the hidden layer; convolutions have a quarter of it and up, those of "resnet50" `width` and up.
    """
    channels, height, side = shape
    if model == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), width), nn.ReLU(), nn.Linear(width, classes))
    if model == "resnet50":
        return resnet50(channels, classes, width)
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


def resnet50(channels: int, classes: int, width: int = 64) -> nn.Sequential:
    """ResNet-50 (He et al. 2016a, table 1) with group norm in place of batch norm, stride in the 3 x 3 convolution.

    Images [n, channels, side, side] to logits [n, classes]. With 3 channels, 1000 classes and width 64 it has the
    published 25 557 032 parameters: a group norm has as many as a batch norm.
    """
    stem = (nn.Conv2d(channels, width, 7, 2, 3, bias=False), norm(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    blocks: list[nn.Module] = []
    before = width
    for stage, count in enumerate((3, 4, 6, 3)):
        middle = width * 2**stage
        for block in range(count):
            blocks.append(Bottleneck(before, middle, stride=2 if stage and not block else 1))
            before = 4 * middle
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def segmenter(model: str, channels: int, classes: int, width: int, levels: int = 3) -> nn.Module:
    """Images [n, channels, side, side] to logits per pixel [n, classes, side, side].

    Args:
        model: "unet" (after Ronneberger et al. 2015; side a multiple of 2 ** (levels - 1)) or "dilated" (residual
            blocks at full resolution with dilations 1, 2, 4 and 8, after Yu et al. 2017).
        channels, classes: how many.
        width: channels of the first level.
        levels: of the U-Net; the paper's has 5, and a width of 64.
    """
    if model == "unet":
        return UNet(channels, classes, width, levels)
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


class Bottleneck(nn.Module):
    """Convolutions 1 x 1, 3 x 3 and 1 x 1 added to the input, then ReLU (He et al. 2016a, figure 5)."""

    def __init__(self, before: int, middle: int, stride: int) -> None:
        super().__init__()
        after = 4 * middle
        last = norm(after)
        nn.init.zeros_(last.weight)  # each block starts as its skip (Goyal et al. 2017)
        self.body = nn.Sequential(
            nn.Conv2d(before, middle, 1, bias=False),
            norm(middle),
            nn.ReLU(),
            nn.Conv2d(middle, middle, 3, stride, 1, bias=False),
            norm(middle),
            nn.ReLU(),
            nn.Conv2d(middle, after, 1, bias=False),
            last,
        )
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            self.skip = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), norm(after))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, before, h, w] to [n, 4 middle, h / stride, w / stride]."""
        return torch.relu(self.skip(x) + self.body(x))


class UNet(nn.Module):
    """Down by half, level by level, and up again; each level's features are kept for the way up.

    The way up repeats pixels where the paper learns a 2 x 2 convolution, and borders are padded.
    """

    def __init__(self, channels: int, classes: int, width: int, levels: int = 3) -> None:
        super().__init__()
        sizes = [width * 2**level for level in range(levels)]
        self.downs = nn.ModuleList(_pair(a, b) for a, b in itertools.pairwise([channels, *sizes[:-1]]))
        self.bottom = _pair(sizes[-2], sizes[-1])
        self.ups = nn.ModuleList(_pair(3 * size, size) for size in reversed(sizes[:-1]))
        self.pool, self.enlarge = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, channels, h, w] to [n, classes, h, w]."""
        kept = []
        for down in self.downs:
            x = down(x)
            kept.append(x)
            x = self.pool(x)
        x = self.bottom(x)
        for up in self.ups:
            x = up(torch.cat([self.enlarge(x), kept.pop()], 1))
        logits: torch.Tensor = self.head(x)
        return logits


def _pair(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [nn.Conv2d(channels, after, 3, padding=1), norm(after), nn.ReLU()]
    return nn.Sequential(*layers)
