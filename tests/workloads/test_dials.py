"""Dials and options of workloads, and what the composed and the closed-form workloads promise."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pybatch.base.errors import UsageError, WorkloadError
from pybatch.optim import SGD
from pybatch.workloads.digits import Digits
from pybatch.workloads.quadratic import Quadratic
from pybatch.workloads.running.finding import find, shipped
from pybatch.workloads.running.session import Session
from pybatch.workloads.scenes import Scenes
from pybatch.workloads.text import Text

CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Options, as typed


def test_options_reach_the_constructor_with_their_types_and_stand_in_the_record() -> None:
    work = find("digits", model="cnn", options=["label_noise=0.25", "width=32", "resolution=16"])
    assert work.batch(2, seeded())[0].shape == (2, 1, 16, 16)
    options = Session(work, CPU).info.options
    assert options == {"subset": 1.0, "label_noise": 0.25, "width": 32, "resolution": 16}
    assert isinstance(options["width"], int)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["labelnoise=1"], r"option 'labelnoise' is not known\. Did you mean 'label_noise'\? Known: .*subset, width"),
        (["width"], "option 'width' is no setting. Write key=value"),
        (["width=wide"], "width is a whole number. Write width=NUMBER"),
        (["width=1.5"], "width is a whole number"),
        (["subset=all"], "subset is a number"),
        (["width=8", "width=9"], "width is given twice"),
        (["model=cnn"], "Write --model cnn"),
        (["subset=0"], "subset=0 is out of range. Give a share above 0"),
        (["label_noise=1.5"], "label_noise=1.5 is out of range"),
        (["label_noise=nan"], "label_noise is a number. Write label_noise=NUMBER"),
        (["resolution=4"], "resolution=4 is out of range"),
        (["width=1"], "width=1 is out of range"),
    ],
)
def test_options_that_cannot_work_are_refused(options: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        find("digits", options=options)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_dial_is_an_argument_and_every_argument_a_dial(name: str) -> None:
    from pybatch.workloads.running.finding import _parameters

    cls = shipped()[name]
    assert set(cls.dials) == set(_parameters(cls)) - {"model", "data"}


def test_a_users_workload_takes_options_too(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "import torch, pybatch\n"
        "class Own(pybatch.Workload):\n"
        "    def __init__(self, depth: int = 1, shape: tuple = ()): self.depth = depth\n"
        "    def model(self): return torch.nn.Linear(2, self.depth)\n"
        "    def batch(self, n, generator, split='train'): return torch.randn(n, 2, generator=generator)\n"
        "    def loss(self, model, batch): return model(batch).square().mean()\n"
    )
    assert find(f"{path}:Own", options=["depth=3"]).depth == 3  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"shape of workload .* takes no text. Annotate it"):
        find(f"{path}:Own", options=["shape=3"])


def test_a_workload_on_files_says_that_it_needs_them() -> None:
    for name in ("mnist", "cifar10", "imagefolder", "textfile"):
        with pytest.raises(UsageError, match=r"reads data of yours. Give its path with --data"):
            find(name)


# Digits


def test_label_noise_replaces_that_share_of_training_labels_alone_and_always_the_same() -> None:
    clean, noisy, again = Digits(), Digits(label_noise=0.3), Digits(label_noise=0.3)
    changed = noisy.images["train"].labels != clean.images["train"].labels
    assert float(changed.float().mean()) == pytest.approx(0.3, abs=0.03)
    assert torch.equal(noisy.images["train"].labels, again.images["train"].labels)
    assert torch.equal(noisy.images["test"].labels, clean.images["test"].labels)
    assert bool((Digits(label_noise=1.0).images["train"].labels != clean.images["train"].labels).all())
    # Another share of noise keeps the labels that less noise has replaced already.
    more = Digits(label_noise=0.6).images["train"].labels != clean.images["train"].labels
    assert bool((more | ~changed).all())


def test_subsets_are_nested_and_count_as_the_examples() -> None:
    whole, half = Digits(), Digits(subset=0.5)
    assert half.examples == 718
    assert torch.equal(half.images["train"].pixels, whole.images["train"].pixels[:718])
    assert len(half.images["test"].labels) == 360


def test_resolution_keeps_the_mean_brightness() -> None:
    small, large = Digits(), Digits(resolution=16)
    pixels = [work.images["train"].pixels.mean() for work in (small, large)]
    assert float(pixels[1]) == pytest.approx(float(pixels[0]), rel=0.03)
    Session(Digits("resnet", resolution=12), CPU).backward(Digits(resolution=12).batch(2, seeded()))


def test_width_sets_the_parameters() -> None:
    counts = [sum(p.numel() for p in Digits(width=w).model().parameters()) for w in (64, 128)]
    assert counts == [64 * 64 + 64 + 640 + 10, 64 * 128 + 128 + 1280 + 10]


# Text


def test_sizes_of_the_language_models() -> None:
    with torch.device("meta"):
        base = Text(size="base", length=256).model()
    blocks = sum(p.numel() for p in base.blocks.parameters())  # type: ignore[union-attr]
    assert blocks == 12 * (12 * 768**2 + 13 * 768)  # as in GPT-2 124M: 85,054,464
    assert Text("lstm", size="small").model().recurrent.hidden_size == 512  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="Did you mean 'small'"):
        Text(size="smal")


def test_length_and_subset_of_text() -> None:
    work = Text(length=32, subset=0.5)
    assert work.batch(3, seeded())[0].shape == (3, 32)
    assert work.examples == pytest.approx(len(Text().text["train"]) * 0.5 / 32, rel=0.01)
    assert Session(work, CPU).loss(work.batch(2, seeded())).ndim == 0
    with pytest.raises(UsageError, match="sequences of 60000"):
        Text(length=60_000)


def test_a_folder_of_text_is_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b" * 9000)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a" * 9000)
    (tmp_path / "c.bin").write_bytes(b"\xff")
    work = find("textfile", data=str(tmp_path))
    assert bytes(work.text["train"][:3].tolist()) == b"bbb"  # type: ignore[attr-defined]
    assert bytes(work.text["test"][-3:].tolist()) == b"aaa"  # type: ignore[attr-defined]
    (tmp_path / "z.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"z.txt' is not UTF-8 text: byte 0 is 0xff"):
        find("textfile", data=str(tmp_path))
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match=r"has no file ending in .txt"):
        find("textfile", data=str(tmp_path / "none"))


# Scenes


def test_scenes_follow_from_the_seed_and_label_what_they_show() -> None:
    work = Scenes(noise=0.0, scenes=64, classes=10)
    pixels, labels = work.compose(200, seeded(), "train")
    same, _ = Scenes(noise=0.0, classes=10).compose(200, seeded(), "train")
    assert torch.equal(pixels, same)
    assert pixels.shape == (200, 1, 8, 8)
    assert labels.shape == (200, 8, 8)
    assert set(labels.unique().tolist()) == set(range(11))
    # Without noise the ground stays below 0.5, and ink is what is labelled.
    assert float(pixels[:, 0][labels == 0].max()) <= 0.5
    assert float(pixels[:, 0][labels > 0].mean()) > 0.6
    first = work.batch(8, seeded(3))
    assert torch.equal(first[0], Scenes(noise=0.0, scenes=64, classes=10).batch(8, seeded(3))[0])


def test_dials_of_scenes_do_what_they_say() -> None:
    def shown(**dials: float) -> torch.Tensor:
        return Scenes(extent=0.5, **dials).compose(100, seeded(), "test")[1]  # type: ignore[arg-type]

    assert int(shown(classes=3).max()) == 3
    assert float((shown(clutter=8) > 0).float().mean()) > 1.3 * float((shown(clutter=4) > 0).float().mean())
    assert shown(resolution=48).shape == (100, 48, 48)
    noisy, clean = (Scenes(noise=n).compose(50, seeded(), "test")[0] for n in (0.5, 0.0))
    assert float((noisy - clean).std()) == pytest.approx(0.5, rel=0.02)
    with pytest.raises(UsageError, match=r"resolution=30 is out of range. Give a multiple of 4"):
        Scenes(resolution=30)


def test_unlimited_scenes_are_new_in_every_batch() -> None:
    work = Scenes(scenes=0)
    assert work.examples is None
    generator = seeded()
    assert not torch.equal(work.batch(4, generator)[0], work.batch(4, generator)[0])


# The noisy quadratic


def test_steps_of_the_quadratic_are_those_of_the_paper() -> None:
    work, rates = Quadratic(), np.geomspace(1e-4, 1.99, 400)
    steps = [work.steps_to_target(2**k, 0.05, rates) for k in range(15)]
    assert steps == [4336, 2178, 1099, 560, 292, 159, 95, 67, 54, 48, 44, 42, 41, 40, 40]
    assert work.noise_scale() == pytest.approx(3.17, abs=0.005)
    assert work.steps_to_target(1, 1e-9, rates) == math.inf


def test_training_the_quadratic_follows_the_closed_form() -> None:
    """The mean of 80 runs by the optimizer against the expectation, and the gradient's variance against c / B."""
    work, batch, rate, steps = Quadratic(d=20), 4, 0.3, 30
    losses = []
    for seed in range(80):
        session = Session(work, CPU, seed=seed)
        optimizer = SGD(session.parameters, lr=rate)
        for _ in range(steps):
            optimizer.zero_grad()
            session.backward(session.batch(batch))
            optimizer.step()
        losses.append(float(session.loss(session.batch(2, "test")).detach()))
    error = np.std(losses) / np.sqrt(len(losses))
    expected = float(work.expected_loss(steps, batch, rate))
    assert abs(np.mean(losses) - expected) < 3 * error
    assert abs(np.mean(losses) - float(work.expected_loss(steps, 2 * batch, rate))) > 5 * error  # B matters here


def test_the_quadratics_gradient_noise_is_exact() -> None:
    work = Quadratic(d=5, noise=2.0)
    session = Session(work, CPU)
    session.backward(session.batch(100_000))
    one = torch.stack([torch.autograd.grad(session.loss(session.batch(1)), session.parameters)[0] for _ in range(2000)])
    torch.testing.assert_close(session.parameters[0].grad, torch.tensor(work.h, dtype=torch.float32), atol=0.02, rtol=0)
    torch.testing.assert_close(one.var(0), torch.tensor(work.c, dtype=torch.float32), atol=0, rtol=0.15)
    assert work.noise_scale([1.0] * 5) == pytest.approx(work.c.sum() / (work.h**2).sum())


def test_a_constructor_that_fails_is_the_workloads_fault(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(
        "import pybatch.workloads.quadratic as q\n"
        "class Bad(q.Quadratic):\n"
        "    def __init__(self, x: int): raise KeyError(x)\n"
    )
    with pytest.raises(WorkloadError, match="raised KeyError: 3"):
        find(f"{path}:Bad", options=["x=3"])
    with pytest.raises(UsageError, match=r"needs a value for x\. Give it with --option x=VALUE"):
        find(f"{path}:Bad")
