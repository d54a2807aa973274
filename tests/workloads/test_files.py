"""Loaders of the user's files, on small files written in the real formats: MNIST, CIFAR-10, image folders."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pybatch.base.errors import UsageError
from pybatch.workloads import cifar10
from pybatch.workloads.running.finding import find
from pybatch.workloads.running.session import Session

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)


def idx(array: np.ndarray) -> bytes:
    """The idx format: 0, 0, type (8: unsigned byte), dimensions; sizes; data. Numbers are big-endian."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


def mnist(place: Path, packed: bool = False, side: int = 28) -> dict[str, np.ndarray]:
    made = {}
    for stem, count in (("train", 30), ("t10k", 10)):
        made[f"{stem}-images-idx3-ubyte"] = RNG.integers(0, 256, (count, side, side), dtype=np.uint8)
        made[f"{stem}-labels-idx1-ubyte"] = (np.arange(count) % 10).astype(np.uint8)
    for name, array in made.items():
        if packed:
            (place / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (place / name).write_bytes(idx(array))
    return made


@pytest.fixture
def small_cifar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of six images each in place of ten thousand."""
    monkeypatch.setattr(cifar10, "IMAGES", 6)


def cifar(place: Path, count: int = 6) -> dict[str, np.ndarray]:
    made = {}
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        made[name] = RNG.integers(0, 256, (count, 3073), dtype=np.uint8)
        made[name][:, 0] = np.arange(count) % 10
        (place / name).write_bytes(made[name].tobytes())
    return made


def pictures(place: Path, classes: int = 3, count: int = 4, suffix: str = "png") -> None:
    from PIL import Image

    for number in range(classes):
        folder = place / f"class{number}"
        folder.mkdir(parents=True)
        for i in range(count):
            colour = tuple(60 * (number == channel) + 100 for channel in range(3))
            Image.new("RGB", (20 + 4 * i, 30), colour).save(folder / f"{i}.{suffix}")


def train_once(name: str, data: Path, model: str) -> None:
    session = Session(find(name, data=str(data), model=model, options=["width=8"]), CPU)
    session.check_finite(session.backward(session.batch(8)), "in the test")


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_mnist(tmp_path: Path, packed: bool) -> None:
    made = mnist(tmp_path, packed)
    work = find("mnist", data=str(tmp_path))
    assert (work.examples, work.data) == (30, str(tmp_path))
    images = work.images["test"]  # type: ignore[attr-defined]
    assert np.array_equal(images.pixels[:, 0].numpy(), made["t10k-images-idx3-ubyte"])
    assert images.labels.tolist() == made["t10k-labels-idx1-ubyte"].tolist()
    pixels, labels = work.batch(64, torch.Generator().manual_seed(0))
    assert pixels.dtype == torch.float32
    assert 0 <= float(pixels.min()) < 0.02 < 0.98 < float(pixels.max()) <= 1
    assert labels.dtype == torch.int64
    for model in work.models:
        train_once("mnist", tmp_path, model)


def test_mnist_under_its_other_file_names(tmp_path: Path) -> None:
    mnist(tmp_path)
    for path in tmp_path.iterdir():
        path.rename(tmp_path / path.name.replace("-idx", ".idx"))
    assert find("mnist", data=str(tmp_path), options=["resolution=12", "subset=0.5"]).examples == 15


def cut(name: str, keep: int) -> Callable[[Path], None]:
    return lambda place: (place / name).write_bytes((place / name).read_bytes()[:keep])  # type: ignore[return-value]


def put(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda place: (place / name).write_bytes(content)  # type: ignore[return-value]


def drop(name: str) -> Callable[[Path], None]:
    return lambda place: (place / name).unlink()


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("spoil", "names", "says"),
    [
        (cut(IMAGES, -5), IMAGES, "its header says 30 x 28 x 28 bytes, 23515 follow.*truncated"),
        (cut(IMAGES, 7), IMAGES, "it has 7 bytes, its header alone has 16"),
        (cut(LABELS, 0), LABELS, "it has 0 bytes"),
        (put(IMAGES, idx(np.zeros(5, np.uint8)) + bytes(20)), IMAGES, "are 0x00000801, not 0x00000803"),
        (put(IMAGES, b"\x89PNG" + bytes(100)), IMAGES, "are 0x89504e47"),
        (put(LABELS, idx(np.zeros(29, np.uint8))), LABELS, "29 labels for 30 images"),
        (put(LABELS, idx(np.full(30, 11, np.uint8))), LABELS, "it has a label 11"),
        (put(IMAGES, idx(np.zeros((0, 28, 28), np.uint8))), IMAGES, "0 x 28 x 28"),
        (drop(LABELS), "", f"has no file {LABELS} or {LABELS}.gz or train-labels.idx1-ubyte"),
    ],
)
def test_a_spoiled_mnist_file_is_named(tmp_path: Path, spoil: Callable[[Path], None], names: str, says: str) -> None:
    mnist(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UsageError, match=says) as caught:
        find("mnist", data=str(tmp_path))
    assert str(tmp_path / names) in str(caught.value)


def test_a_spoiled_gzip_file_is_named(tmp_path: Path) -> None:
    mnist(tmp_path, packed=True)
    for spoil in (cut(f"{IMAGES}.gz", 500), put(f"{IMAGES}.gz", b"plain")):
        spoil(tmp_path)
        with pytest.raises(UsageError, match=rf"{IMAGES}.gz' is not a whole gzip file"):
            find("mnist", data=str(tmp_path))


@pytest.mark.usefixtures("small_cifar")
def test_cifar10(tmp_path: Path) -> None:
    made = cifar(tmp_path)
    work = find("cifar10", data=str(tmp_path))
    assert work.examples == 30
    images = work.images["test"]  # type: ignore[attr-defined]
    record = made["test_batch.bin"][4]
    assert int(images.labels[4]) == record[0]
    red, blue = record[1:1025].reshape(32, 32), record[2049:].reshape(32, 32)
    assert np.array_equal(images.pixels[4, 0].numpy(), red)
    assert np.array_equal(images.pixels[4, 2].numpy(), blue)
    for model in work.models:
        train_once("cifar10", tmp_path, model)
    (tmp_path / "up").mkdir()
    inner = tmp_path / "up" / "cifar-10-batches-bin"
    inner.mkdir()
    cifar(inner)
    assert find("cifar10", data=str(tmp_path / "up")).examples == 30  # the folder the archive was unpacked in


def test_a_real_cifar_file_cut_between_two_images_is_named(tmp_path: Path) -> None:
    with (tmp_path / "data_batch_1.bin").open("wb") as file:
        file.truncate(9_999 * 3073)  # a hole: nothing is written
    says = r"data_batch_1.bin' is not .*it has 30726927 bytes, 10000 images of 3073 bytes are 30730000"
    with pytest.raises(UsageError, match=says):
        find("cifar10", data=str(tmp_path))


@pytest.mark.usefixtures("small_cifar")
@pytest.mark.parametrize(
    ("spoil", "names", "says"),
    [
        (cut("data_batch_3.bin", -1), "data_batch_3.bin", "it has 18437 bytes, 6 images of 3073 bytes are 18438"),
        (cut("data_batch_2.bin", 5 * 3073), "data_batch_2.bin", "it has 15365 bytes.*truncated"),  # between two images
        (put("data_batch_4.bin", bytes(7 * 3073)), "data_batch_4.bin", "it has 21511 bytes"),
        (cut("test_batch.bin", 0), "test_batch.bin", "it has 0 bytes"),
        (
            put("data_batch_1.bin", bytes(3073) + b"\x0a" + bytes(5 * 3073 - 1)),
            "data_batch_1.bin",
            "image 1 has label 10",
        ),
        (drop("data_batch_5.bin"), "", "has no file data_batch_5.bin"),
    ],
)
def test_a_spoiled_cifar_file_is_named(tmp_path: Path, spoil: Callable[[Path], None], names: str, says: str) -> None:
    cifar(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UsageError, match=says) as caught:
        find("cifar10", data=str(tmp_path))
    assert str(tmp_path / names) in str(caught.value)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "imagefolder"])
def test_data_that_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"does not exist. Give the folder that holds"):
        find(name, data=str(tmp_path / "absent"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"is a file. Give the folder"):
        find(name, data=str(tmp_path / "file"))


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_class_folders(tmp_path: Path, suffix: str) -> None:
    pictures(tmp_path, suffix=suffix)
    work = find("imagefolder", data=str(tmp_path), options=["resolution=16"])
    assert work.examples == 11  # one of twelve tests
    train = work.images["train"]  # type: ignore[attr-defined]
    assert train.pixels.shape == (11, 3, 16, 16)
    brightest = train.pixels.float().mean((2, 3)).argmax(1)
    assert torch.equal(brightest, train.labels)  # the class is the colour
    again = find("imagefolder", data=str(tmp_path), options=["resolution=16"])
    assert torch.equal(again.images["train"].pixels, train.pixels)  # type: ignore[attr-defined]
    session = Session(work, CPU)
    session.backward(session.batch(4))


def test_class_folders_with_a_split_of_their_own(tmp_path: Path) -> None:
    pictures(tmp_path / "train", count=5)
    pictures(tmp_path / "val", count=2)
    work = find("imagefolder", data=str(tmp_path), options=["resolution=8", "subset=0.4"])
    assert (work.examples, len(work.images["test"].labels)) == (6, 6)  # type: ignore[attr-defined]
    (tmp_path / "val" / "other").mkdir()
    with pytest.raises(UsageError, match=r"has the class 'other', which .*train' lacks"):
        find("imagefolder", data=str(tmp_path))


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"not an image", "Pillow knows no such format"), (None, "is not a whole image"), (b"", "no such format")],
)
def test_a_spoiled_image_is_named(tmp_path: Path, content: bytes | None, says: str) -> None:
    pictures(tmp_path)
    path = tmp_path / "class1" / "2.png"
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    with pytest.raises(UsageError, match=says) as caught:
        find("imagefolder", data=str(tmp_path))
    assert str(path) in str(caught.value)


def test_folders_that_hold_no_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a folder for each class, found none"):
        find("imagefolder", data=str(tmp_path))
    (tmp_path / "a").mkdir()
    with pytest.raises(UsageError, match="found only 'a'"):
        find("imagefolder", data=str(tmp_path))
    (tmp_path / "b").mkdir()
    with pytest.raises(UsageError, match="class folders without images"):
        find("imagefolder", data=str(tmp_path))


def test_images_that_do_not_fit_memory_are_refused_before_they_are_read(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(120):
            (tmp_path / name / f"{i}.png").touch()
    with pytest.raises(UsageError, match=r"takes 11 GiB in memory at resolution=4096, over 8"):
        find("imagefolder", data=str(tmp_path), options=["resolution=4096"])


def test_without_pillow_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UsageError, match=r"decodes with Pillow, which is missing. pip install pillow"):
        find("imagefolder", data=str(tmp_path))


def boundaries(raw: bytes, inner: set[int]) -> list[int]:
    """Lengths to cut a file to: none, every place where a part of it ends, one byte to each side, some others."""
    places = {0, 1, len(raw) // 3, len(raw) // 2, len(raw) - 2, len(raw) - 1} | inner
    near = {place + off for place in places for off in (-1, 0, 1)}
    return sorted(place for place in near if 0 <= place < len(raw))


def refused(name: str, data: Path, path: Path, keep: int) -> None:
    """The file cut to `keep` bytes is an error that names it."""
    raw = path.read_bytes()
    path.write_bytes(raw[:keep])
    try:
        with pytest.raises(UsageError) as caught:
            find(name, data=str(data))
        assert str(path) in str(caught.value), keep
    finally:
        path.write_bytes(raw)


@pytest.mark.usefixtures("small_cifar")
def test_cifar_files_cut_anywhere_are_named(tmp_path: Path) -> None:
    cifar(tmp_path)
    for path in (tmp_path / "data_batch_5.bin", tmp_path / "test_batch.bin"):
        for keep in boundaries(path.read_bytes(), {1, *range(0, 6 * 3073, 3073), 3073 + 1, 3073 + 1025}):
            refused("cifar10", tmp_path, path, keep)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_mnist_files_cut_anywhere_are_named(tmp_path: Path, packed: bool) -> None:
    mnist(tmp_path, packed, side=8)
    for path in sorted(tmp_path.iterdir()):
        raw = path.read_bytes()
        header = {4 * i for i in range(5)} | {8 + 64 * i for i in (1, 2, 29)} | {16 + 64 * i for i in (1, 2, 29)}
        trailer = {len(raw) - 8, len(raw) - 4} if packed else set()  # check sum and length end a gzip file
        for keep in boundaries(raw, header | trailer):
            refused("mnist", tmp_path, path, keep)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "webp", "tiff"])
def test_images_cut_anywhere_are_named_or_whole(tmp_path: Path, suffix: str) -> None:
    """What a decoder accepts must have every pixel: a few bytes after the last one may be missing."""
    pictures(tmp_path, classes=2, count=2, suffix=suffix)
    path = tmp_path / "class1" / f"0.{suffix}"
    raw = path.read_bytes()
    options = ["resolution=8"]
    splits = find("imagefolder", data=str(tmp_path), options=options).images  # type: ignore[attr-defined]
    for keep in boundaries(raw, {8, 16, 33, 54, len(raw) - 12, len(raw) - 16}):
        path.write_bytes(raw[:keep])
        found, says = splits, str(path)
        try:
            found = find("imagefolder", data=str(tmp_path), options=options).images  # type: ignore[attr-defined]
        except UsageError as error:
            says = str(error)
        assert str(path) in says
        for split, images in splits.items():
            assert torch.equal(found[split].pixels, images.pixels), keep


def test_text_cut_within_a_character_is_named(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("Große Wörter \U0001f600 " * 2000, encoding="utf-8")
    path = tmp_path / "b.txt"
    raw = path.read_bytes()
    for keep in range(len(raw) - 26, len(raw)):
        path.write_bytes(raw[:keep])
        whole = raw[:keep].decode("utf-8", "ignore").encode() == raw[:keep]
        if whole:
            assert find("textfile", data=str(tmp_path)).examples
            continue
        with pytest.raises(UsageError, match=r"is not UTF-8 text: byte \d+") as caught:
            find("textfile", data=str(tmp_path))
        assert str(path) in str(caught.value)
