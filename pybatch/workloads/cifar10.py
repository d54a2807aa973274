"""CIFAR-10 from the user's files in its binary version (Krizhevsky 2009)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pybatch.workloads import files
from pybatch.workloads.base import register
from pybatch.workloads.images import ImageClassification, Images

_SIDE, _CHANNELS, _CLASSES = 32, 3, 10
_RECORD = 1 + _CHANNELS * _SIDE * _SIDE  # bytes: the label, then the planes of red, green and blue
IMAGES = 10_000  # of every file; one that is cut off between two images shows in nothing else
_INNER = "cifar-10-batches-bin"  # the folder the archive unpacks to


@register
class Cifar10(ImageClassification):
    """32 x 32 colour images of ten classes from the binary version's files of yours.

    `data` is the folder with data_batch_1.bin to data_batch_5.bin and test_batch.bin, or the one it lies in.
    """

    name = "cifar10"
    target: dict[str, float] = {"train": 1.0, "test": 1.2}  # noqa: RUF012
    learning_rate = 1e-3
    reference_batch = 64
    models = ("cnn", "resnet", "mlp")

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
        place = files.folder(data, "data_batch_1.bin to data_batch_5.bin and test_batch.bin")
        place = place / _INNER if (place / _INNER).is_dir() else place
        train = [_read(files.one_of(place, (f"data_batch_{i}.bin",))) for i in range(1, 6)]
        splits = {"train": _images(train), "test": _images([_read(files.one_of(place, ("test_batch.bin",)))])}
        self._prepare(model, splits, subset, label_noise, resolution, width)
        self.data = data


def _read(path: Path) -> np.ndarray:
    """Records [n, 3073] of one file."""
    raw = files.read(path)
    if len(raw) != IMAGES * _RECORD:
        found = f"it has {len(raw)} bytes, {IMAGES} images of {_RECORD} bytes are {IMAGES * _RECORD}"
        raise files.foreign(path, "CIFAR-10's binary version", found)
    records = np.frombuffer(raw, dtype=np.uint8).reshape(-1, _RECORD)
    if records[:, 0].max() >= _CLASSES:
        row = int(np.argmax(records[:, 0] >= _CLASSES))
        raise files.foreign(path, "CIFAR-10's binary version", f"image {row} has label {records[row, 0]}, not 0 to 9")
    return records


def _images(parts: list[np.ndarray]) -> Images:
    records = np.concatenate(parts)
    pixels = torch.tensor(records[:, 1:].reshape(-1, _CHANNELS, _SIDE, _SIDE))
    return Images(pixels, torch.tensor(records[:, 0], dtype=torch.int64))
