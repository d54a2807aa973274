"""MNIST, and the sets that share its format, from the user's idx files (LeCun et al. 1998)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pybatch.workloads import files
from pybatch.workloads.base import register
from pybatch.workloads.images import ImageClassification, Images

_IMAGES, _LABELS = 0x00000803, 0x00000801  # magic numbers: unsigned bytes, of three dimensions and of one
_CLASSES = 10


@register
class Mnist(ImageClassification):
    """Grey images of ten classes from idx files of yours (MNIST, Fashion-MNIST), .gz or unpacked.

    `data` is the folder with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
    t10k-labels-idx1-ubyte.
    """

    name = "mnist"
    target: dict[str, float] = {"train": 0.1, "test": 0.12}  # noqa: RUF012
    learning_rate = 1e-3
    reference_batch = 64

    def __init__(
        self,
        data: str,
        model: str | None = None,
        *,
        subset: float = 1.0,
        label_noise: float = 0.0,
        resolution: int | None = None,
        width: int = 64,
    ) -> None:
        place = files.folder(data, "MNIST's four idx files")
        splits = {split: _split(place, stem) for split, stem in (("train", "train"), ("test", "t10k"))}
        self._prepare(model, splits, subset, label_noise, resolution, width)
        self.data = data


def _split(place: Path, stem: str) -> Images:
    where, pixels = _idx(place, f"{stem}-images", _IMAGES)
    beside, labels = _idx(place, f"{stem}-labels", _LABELS)
    if len(pixels) != len(labels):
        raise files.foreign(beside, f"the labels of '{where}'", f"{len(labels)} labels for {len(pixels)} images")
    if labels.max() >= _CLASSES:
        raise files.foreign(beside, "a file of labels 0 to 9", f"it has a label {labels.max()}")
    return Images(torch.tensor(pixels[:, None]), torch.tensor(labels, dtype=torch.int64))


def _idx(place: Path, stem: str, magic: int) -> tuple[Path, np.ndarray]:
    """One idx file: magic number, sizes, then bytes; all numbers are big-endian."""
    dimensions = magic & 0xFF
    name = f"idx{dimensions}-ubyte"
    path = files.one_of(place, tuple(f"{stem}{sep}{name}{gz}" for sep in "-." for gz in ("", ".gz")))
    raw = files.read(path)
    expected = f"an idx file of {dimensions} dimension{'s' * (dimensions > 1)}"
    head = 4 * (1 + dimensions)
    if len(raw) < head:
        raise files.foreign(path, expected, f"it has {len(raw)} bytes, its header alone has {head}")
    found, *sizes = np.frombuffer(raw[:head], dtype=">u4").tolist()
    if found != magic:
        raise files.foreign(path, expected, f"its first four bytes are 0x{found:08x}, not 0x{magic:08x}")
    if len(raw) - head != int(np.prod(sizes)) or not all(sizes):
        shape = " x ".join(map(str, sizes))
        raise files.foreign(path, expected, f"its header says {shape} bytes, {len(raw) - head} follow")
    return path, np.frombuffer(raw[head:], dtype=np.uint8).reshape(sizes)
