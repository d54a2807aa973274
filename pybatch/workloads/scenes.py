"""Semantic segmentation of composed scenes: handwritten digits on textured ground, a label for every pixel."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

import torch
from torch import nn

from pybatch.workloads import digits
from pybatch.workloads.base import Split, Workload, check_dial, chosen_model, register
from pybatch.workloads.images import Images
from pybatch.workloads.vision import SEGMENTERS, segmenter

_SIDE = 8  # pixels
_TEST = 1024  # scenes
_INK = 0.4  # of full ink: a pixel from there on belongs to the digit
_CHUNK = 512  # scenes composed at a time
_SEEDS = {"train": 1, "test": 2}
_PATCHES = 4  # of the ground's texture, along a side


@register
class Scenes(Workload):
    """Grey scenes of handwritten digits on textured ground; every pixel is ground or one of the digits' classes.

    A scene has `clutter` digits of random place, size and brightness, later ones over earlier ones. Training scenes
    show the training digits, test scenes the test digits. They are composed once, from a fixed seed, and drawn
    uniformly with replacement; with scenes=0 every training batch is composed anew.
    Models: "unet" (the default) and "dilated" (a residual network at full resolution). As they ship, on one digit in
    8 x 8 pixels, AdamW takes them to the target in some 540 and 370 steps at batch 4 and a fifth of that at batch 64.
    --size base is the paper's U-Net of five levels from 64 channels on, on four digits in 256 x 256 pixels.
    """

    name = "scenes"
    unit = "images"
    target: dict[str, float] = {"train": 0.3, "test": 0.33}  # noqa: RUF012
    learning_rate = 1e-2
    reference_batch = 16
    swept_by = "adamw"
    evaluation_examples = 128  # their loss is known within 4 %
    models: ClassVar[tuple[str, ...]] = SEGMENTERS
    dials: ClassVar[dict[str, str]] = {
        "classes": "digits told apart, 2 to 10 (3)",
        "clutter": "digits in a scene (1)",
        "extent": "width of the largest digits, as a share of the side; the smallest have half of it (1)",
        "noise": "standard deviation of the pixel noise, full ink being 1 (0.1)",
        "resolution": "pixels a side, a multiple of 4 from 8 on (8); of 2 to the power (levels - 1) for a deep U-Net",
        "scenes": "training scenes; 0: composed anew for each batch (4096)",
        "width": "channels of the first level (8)",
        "levels": "resolutions of the U-Net, 2 to 8 (2)",
    }
    sizes: ClassVar[dict[str, dict[str, int | float | str]]] = {
        "tiny": {},
        # The paper's U-Net. Fewer scenes than usual: they are large, and are kept in memory.
        "base": {
            "model": "unet",
            "width": 64,
            "levels": 5,
            "resolution": 256,
            "scenes": 512,
            "classes": 4,
            "clutter": 4,
            "extent": 0.5,
        },
    }

    def __init__(
        self,
        model: str | None = None,
        *,
        classes: int = 3,
        clutter: int = 1,
        extent: float = 1.0,
        noise: float = 0.1,
        resolution: int = _SIDE,
        scenes: int = 4096,
        width: int = 8,
        levels: int = 2,
    ) -> None:
        self.model_name = chosen_model(self.name, model, self.models)
        check_dial(self.name, "classes", classes, 2, 10, "2 to 10")
        check_dial(self.name, "clutter", clutter, 1, 1000, "1 to 1000")
        check_dial(self.name, "extent", extent, 1e-3, 1.0, "a share above 0, at most 1")
        check_dial(self.name, "noise", noise, 0.0, 100.0, "0 or more")
        check_dial(self.name, "levels", levels, 2, 8, "2 to 8")
        step = max(4, 2 ** (levels - 1))
        wanted = f"a multiple of {step} from {max(_SIDE, step)} to 1024"
        whole = resolution - resolution % step
        check_dial(self.name, "resolution", resolution, max(_SIDE, step), 1024, wanted)
        check_dial(self.name, "resolution", resolution, whole, whole, wanted)
        check_dial(self.name, "scenes", scenes, 0, 10_000_000, "0 to 10000000")
        check_dial(self.name, "width", width, 4, 4096, "a whole number from 4 to 4096")
        self.classes, self.clutter, self.extent, self.noise, self.side = classes, clutter, extent, noise, resolution
        self.width, self.levels = width, levels
        self.examples = scenes or None
        self.options = {"classes": classes, "clutter": clutter, "extent": extent, "noise": noise,
                        "resolution": resolution, "scenes": scenes, "width": width, "levels": levels}  # fmt: skip

    def model(self) -> nn.Module:
        """A fresh model: [n, 1, side, side] to logits [n, classes + 1, side, side], ground first."""
        return segmenter(self.model_name or self.models[0], 1, self.classes + 1, self.width, self.levels)

    def batch(self, n: int, generator: torch.Generator, split: Split = "train") -> tuple[torch.Tensor, torch.Tensor]:
        """Scenes [n, 1, side, side] and the class of every pixel [n, side, side]."""
        if split == "train" and self.examples is None:
            return self.compose(n, generator, split)
        count = self.examples if split == "train" and self.examples else _TEST
        kept = _composed(self.classes, self.clutter, self.extent, self.noise, self.side, count, split)
        chosen = torch.randint(len(kept.labels), (n,), generator=generator)
        return kept.pixels[chosen], kept.labels[chosen].long()

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy per pixel, nats."""
        pixels, labels = batch
        return nn.functional.cross_entropy(model(pixels), labels)

    def compose(self, n: int, generator: torch.Generator, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
        """n new scenes: pixels [n, 1, side, side] and classes [n, side, side]."""
        return _compose(n, generator, split, self.classes, self.clutter, self.extent, self.noise, self.side)


@lru_cache(4)  # of the process, not of the workload: this may be sent to other processes
def _composed(classes: int, clutter: int, extent: float, noise: float, side: int, count: int, split: Split) -> Images:
    """The scenes of a split, from its fixed seed, in parts so that memory stays small."""
    fixed = torch.Generator().manual_seed(_SEEDS[split])
    sizes = [min(_CHUNK, count - done) for done in range(0, count, _CHUNK)]
    parts = [_compose(size, fixed, split, classes, clutter, extent, noise, side) for size in sizes]
    return Images(torch.cat([p for p, _ in parts]), torch.cat([labels.to(torch.uint8) for _, labels in parts]))


def _compose(
    n: int,
    generator: torch.Generator,
    split: Split,
    classes: int,
    clutter: int,
    extent: float,
    noise: float,
    side: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    ink = digits.load()[split]
    known = ink.labels < classes
    glyphs, names = ink.pixels[known][:, 0], ink.labels[known]

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    coarse = uniform(0.0, 0.5, 1, _PATCHES, _PATCHES)
    scene = nn.functional.interpolate(coarse, (side, side), mode="bilinear", align_corners=True)[:, 0]
    labels = torch.zeros(n, side, side, dtype=torch.int64)
    along = torch.arange(side, dtype=torch.float32) + 0.5
    for _ in range(clutter):
        which = torch.randint(len(names), (n,), generator=generator)
        scale = uniform(extent / 2, extent) * side  # pixels a digit is wide
        corner = uniform(0.0, 1.0, 2) * (side - scale)[:, None]
        brightness = uniform(0.6, 1.2)
        # Where each pixel of the scene lies in the digit's own square, -1..1; outside, there is no ink.
        x, y = (2 * (along - corner[:, i, None]) / scale[:, None] - 1 for i in (0, 1))
        grid = torch.stack([x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], -1)
        drawn = nn.functional.grid_sample(glyphs[which][:, None], grid, align_corners=False)[:, 0]
        on = drawn > _INK
        scene = torch.where(on, drawn * brightness[:, None, None], scene)
        labels = torch.where(on, names[which][:, None, None] + 1, labels)
    scene = scene + noise * torch.randn(scene.shape, generator=generator)
    return scene[:, None], labels
