"""`--size base`: the shapes of published models, by their parameter counts, and what is refused."""

from __future__ import annotations

import shlex
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import pybatch.jobs.bench
from pybatch import cli
from pybatch.base.errors import UsageError
from pybatch.device import identity
from pybatch.jobs.options import BenchOptions
from pybatch.records import Run
from pybatch.workloads.running.finding import find, shipped
from pybatch.workloads.running.session import Session
from pybatch.workloads.vision import UNet, resnet50

CPU = torch.device("cpu")


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_base_text_is_gpt2_124m_with_a_padded_vocabulary() -> None:
    work = find("text", size="base")
    with torch.device("meta"):
        model = work.model()
    padding = 50_304 - 50_257
    assert count(model) - padding * 768 == 124_439_808  # GPT-2 small as released, read-out tied to the embedding
    assert model.head.weight is model.tokens.weight
    assert work.batch(2, torch.Generator())[0].shape == (2, 1024)
    assert work.learning_rate == 6e-4


def test_base_images_are_resnet50() -> None:
    work = find("digits", size="base")
    with torch.device("meta"):
        published, ours = resnet50(3, 1000), work.model()
    assert count(published) == 25_557_032  # He et al. 2016, as counted in torchvision's resnet50
    stem, head = 2 * 64 * 7 * 7, 990 * (2048 + 1)  # one channel in place of three, 10 classes in place of 1000
    assert count(ours) == 25_557_032 - stem - head
    pixels = work.batch(1, torch.Generator())[0]
    assert pixels.shape == (1, 1, 224, 224)
    assert ours[:-3](pixels.to("meta")).shape == (1, 2048, 7, 7)


def test_base_scenes_are_the_published_unet() -> None:
    """Two 3 x 3 convolutions a level, 64 to 1024 channels, as in figure 1 of Ronneberger et al. 2015."""

    def pair(before: int, after: int) -> int:
        return 9 * before * after + after + 9 * after * after + after

    widths = [64, 128, 256, 512, 1024]
    down = sum(pair(a, b) for a, b in pairwise([1, *widths]))
    up = sum(4 * 2 * c * c + c + pair(2 * c, c) for c in widths[:-1])
    published = down + up + 64 * 2 + 2
    assert published == 31_030_658
    work = find("scenes", size="base")
    with torch.device("meta"):
        ours, base = UNet(1, 2, 64, levels=5), work.model()
    # 3 c channels enter the way up in place of 2 c after a learned 2 x 2 convolution; norms have 2 a channel.
    enlarged = sum(c * c - c for c in widths[:-1])
    norms = 4 * sum(widths) + 4 * sum(widths[:-1])
    assert count(ours) == published + enlarged + norms
    assert count(base) == count(ours) + 3 * (64 + 1)  # four classes and the ground in place of two


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("digits", ["resolution=64"]),
        ("scenes", ["resolution=32", "scenes=8"]),
        ("text", ["length=32"]),
    ],
)
def test_a_base_model_takes_a_step_and_flags_outrank_the_size(name: str, options: list[str]) -> None:
    work = find(name, size="base", options=options)
    assert dict(option.split("=") for option in options).items() <= {k: str(v) for k, v in work.options.items()}.items()
    session = Session(work, CPU)
    start = time.monotonic()
    loss = session.check_finite(session.backward(session.batch(1)), "here")
    assert time.monotonic() - start < 60
    assert loss > 0
    assert all(p.grad is not None for p in session.parameters)


def test_a_model_outranks_the_size() -> None:
    assert find("digits", size="base", model="cnn").model_name == "cnn"


@pytest.mark.parametrize("name", sorted(shipped()))
def test_tiny_is_what_ships_and_every_size_can_be_built(name: str) -> None:
    cls = shipped()[name]
    if cls.sizes:
        assert list(cls.sizes) == ["tiny", "base"]
        assert cls.sizes["tiny"] == {}
        assert set(cls.sizes["base"]) <= {"model", *cls.dials}


def test_sizes_that_cannot_be_had_are_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "import torch, pybatch\n"
        "class Own(pybatch.Workload):\n"
        "    def __init__(self, width: int = 1): self.width = width\n"
        "    def model(self): return torch.nn.Linear(2, self.width)\n"
        "    def batch(self, n, generator, split='train'): return torch.randn(n, 2, generator=generator)\n"
        "    def loss(self, model, batch): return model(batch).square().mean()\n"
        "class Sized(Own):\n"
        "    sizes = {'huge': {'width': 9}}\n"
    )
    with pytest.raises(UsageError, match=r"size 'base': workload '.*own.py:Own' has no sizes; pybatch cannot know"):
        find(f"{path}:Own", size="base")
    assert find(f"{path}:Sized", size="huge").width == 9  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="size 'base' is not known"):
        find(f"{path}:Sized", size="base")
    with pytest.raises(UsageError, match=r"workload 'quadratic' has no sizes; it has one size only\. Leave --size out"):
        find("quadratic", size="base")
    with pytest.raises(UsageError, match="Did you mean 'base'"):
        find("text", size="bas")


def typed(monkeypatch: pytest.MonkeyPatch, command: str) -> int:
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_the_size_as_typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(monkeypatch, "pybatch bench --cpu --size base --dry-run") == 0
    assert "digits (resnet50), fp32" in capsys.readouterr().out
    assert typed(monkeypatch, "pybatch bench --cpu --size huge --dry-run") == 2
    assert "size 'huge' is not known" in capsys.readouterr().err
    assert typed(monkeypatch, "pybatch list") == 0
    assert "Sizes: tiny, base." in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("--size base", "bf16"), ("--size base --dtype fp32", "fp32"), ("--size tiny", "fp32"), ("", "fp32")],
)
def test_base_on_a_gpu_runs_in_bf16(monkeypatch: pytest.MonkeyPatch, run: Run, flags: str, dtype: str) -> None:
    asked = []

    def run_bench(workload: object, options: BenchOptions, **rest: object) -> Run:
        asked.append(options.dtype)
        return run

    monkeypatch.setattr(pybatch.jobs.bench, "run_bench", run_bench)
    monkeypatch.setattr(identity, "resolve", lambda request: torch.device("cuda", 0))
    assert typed(monkeypatch, f"pybatch bench --gpu 0 --quiet {flags}") == 0
    assert asked == [dtype]
