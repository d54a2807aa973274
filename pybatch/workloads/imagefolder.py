"""Image classification on a folder of the user's: one folder a class, image files inside."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from pybatch.base.errors import UsageError
from pybatch.workloads import files
from pybatch.workloads.base import check_dial, register
from pybatch.workloads.images import ImageClassification, Images

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_TESTED = 0.1  # share of the images that tests where the folder has no split of its own
_SPLIT_SEED = 0
_MEMORY = 8 * 2**30  # bytes of decoded images: what a workstation has to spare


@register
class ImageFolder(ImageClassification):
    """Images in class folders of yours, decoded with Pillow, cropped to the middle square and scaled.

    `data` is a folder with train/CLASS/... and test/CLASS/... (or val/CLASS/...); or with CLASS/..., of which a fixed
    tenth tests. Needs `pip install pillow`.
    """

    name = "imagefolder"
    target: dict[str, float] = {"train": 0.5, "test": 1.0}  # noqa: RUF012
    learning_rate = 1e-3
    reference_batch = 64
    models = ("resnet", "cnn", "mlp")
    dials: ClassVar[dict[str, str]] = ImageClassification.dials | {"resolution": "pixels a side, 8 or more (64)"}

    def __init__(
        self,
        data: str,
        model: str | None = None,
        *,
        subset: float = 1.0,
        label_noise: float = 0.0,
        resolution: int = 64,
        width: int = 64,
    ) -> None:
        check_dial(self.name, "resolution", resolution, 8, 4096, "8 to 4096 pixels")  # before anything is decoded
        check_dial(self.name, "subset", subset, 1e-9, 1.0, "a share above 0, at most 1")
        names, found = _listing(files.folder(data, "a folder for each class"))
        self.classes = len(names)
        # Decoding is the cost: a subset decodes no more than it uses.
        found["train"] = found["train"][: max(1, round(subset * len(found["train"])))]
        size = sum(map(len, found.values())) * 3 * resolution**2
        if size > _MEMORY:
            raise UsageError(
                f"data '{data}' takes {size / 2**30:.0f} GiB in memory at resolution={resolution}, over "
                f"{_MEMORY / 2**30:.0f}. Give a smaller resolution or subset."
            )
        splits = {split: _decoded(pairs, resolution) for split, pairs in found.items()}
        self._prepare(model, splits, 1.0, label_noise, None, width)
        self.options = dict(self.options) | {"subset": subset}
        self.data = data


Pairs = list[tuple[Path, int]]  # file, class


def _listing(place: Path) -> tuple[list[str], dict[str, Pairs]]:
    """Class names, and the files of both splits in a fixed random order."""
    held = next((name for name in ("test", "val") if (place / name).is_dir()), None)
    if (place / "train").is_dir() and held:
        names = _classes(place / "train")
        strange = sorted(set(_classes(place / held)) - set(names))
        if strange:
            raise UsageError(f"data '{place / held}' has the class '{strange[0]}', which '{place / 'train'}' lacks.")
        return names, {"train": _pairs(place / "train", names), "test": _pairs(place / held, names)}
    names = _classes(place)
    pairs = _pairs(place, names)
    tested = max(1, round(_TESTED * len(pairs)))
    if len(pairs) <= tested:
        raise UsageError(f"data '{place}' has {len(pairs)} image. One is needed to train and one to test.")
    return names, {"train": pairs[tested:], "test": pairs[:tested]}


def _classes(place: Path) -> list[str]:
    names = sorted(p.name for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(names) < 2:
        found = f"only '{names[0]}'" if names else "none"
        raise UsageError(f"data '{place}' should have a folder for each class, found {found}. Name at least two.")
    return names


def _pairs(place: Path, names: list[str]) -> Pairs:
    pairs = []
    for number, name in enumerate(names):
        paths = sorted(p for p in (place / name).rglob("*") if p.suffix.lower() in _SUFFIXES) if name else []
        pairs += [(path, number) for path in paths]
    if not pairs:
        kinds = ", ".join(sorted(_SUFFIXES))
        raise UsageError(f"data '{place}' has class folders without images. Files ending in {kinds} are read.")
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(pairs))
    return [pairs[i] for i in order]


def _decoded(pairs: Pairs, side: int) -> Images:
    """Pixels [n, 3, side, side] of uint8 and labels [n]."""
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError:
        raise UsageError("workload 'imagefolder' decodes with Pillow, which is missing. pip install pillow.") from None
    pixels = np.empty((len(pairs), 3, side, side), dtype=np.uint8)
    for row, (path, _) in enumerate(pairs):
        try:
            # Pillow warns of damaged metadata, which is not used; damaged pixels raise.
            with warnings.catch_warnings(action="ignore", category=UserWarning), Image.open(path) as image:
                square = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BILINEAR)
        except UnidentifiedImageError:
            raise files.foreign(path, "an image", "Pillow knows no such format") from None
        except Image.DecompressionBombError as error:
            raise UsageError(f"data '{path}' is too large an image: {error}. Scale it down first.") from None
        except (OSError, SyntaxError, ValueError) as error:  # what decoders raise on damaged files
            raise files.foreign(path, "a whole image", str(error)) from None
        pixels[row] = np.asarray(square).transpose(2, 0, 1)
    return Images(torch.from_numpy(pixels), torch.tensor([label for _, label in pairs], dtype=torch.int64))
