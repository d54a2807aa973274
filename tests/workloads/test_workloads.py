"""The workloads that ship, and finding them or a user's own."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map

from pybatch.base.errors import UsageError, WorkloadError
from pybatch.optim import AdamW
from pybatch.workloads import digits, text
from pybatch.workloads.base import Workload
from pybatch.workloads.running import finding
from pybatch.workloads.running.finding import find, shipped
from pybatch.workloads.running.session import Session, fixed_batches

CPU = torch.device("cpu")
EVERY = [("quadratic", None)] + [
    (name, model) for name in ("digits", "scenes", "text") for model in shipped()[name].models
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_module_of_the_package_is_looked_through() -> None:
    names = {"digits", "scenes", "text", "quadratic", "cifar10", "mnist", "textfile", "imagefolder"}
    assert names <= set(shipped())


@pytest.mark.parametrize(("name", "model"), EVERY)
def test_batches_follow_from_the_generator_and_may_exceed_the_data(name: str, model: str | None) -> None:
    work = find(name, model=model)
    first, same, other = (work.batch(5, seeded(s))[0] for s in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.equal(first, work.batch(5, seeded(1), "test")[0])
    if work.examples is not None:
        big = work.batch(work.examples + 1, seeded())
        assert all(len(part) == work.examples + 1 for part in big)


@pytest.mark.parametrize(("name", "model"), [case for case in EVERY[1:] if case[1] != "resnet50"])  # half a minute
def test_the_first_loss_is_that_of_knowing_nothing_and_training_lowers_it(name: str, model: str) -> None:
    session = Session(find(name, model=model), CPU, seed=0)
    classes = {"digits": 10, "scenes": 4, "text": 256}[name]
    first = float(session.loss(session.batch(256)).detach())
    assert first == pytest.approx(math.log(classes), rel=0.15)
    optimizer = AdamW(session.parameters, lr=session.workload.learning_rate)
    for _ in range(60):
        optimizer.zero_grad()
        session.backward(session.batch(session.workload.reference_batch))
        optimizer.step()
    assert float(session.loss(session.batch(256, "test")).detach()) < 0.75 * first


@pytest.mark.parametrize(("name", "model"), EVERY)
def test_loss_and_gradient_are_means_over_examples(name: str, model: str | None) -> None:
    session = Session(find(name, model=model), CPU)
    batch = session.batch(6)
    whole = session.loss(batch)
    parts = [session.loss(tree_map(lambda part, i=i: part[i : i + 2], batch)) for i in (0, 2, 4)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())
    grads = [torch.autograd.grad(loss, session.parameters) for loss in (whole, torch.stack(parts).mean())]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_digits_split_is_fixed_disjoint_and_whole() -> None:
    data = digits.load()
    sizes = {split: len(images.labels) for split, images in data.items()}
    assert sizes == {"train": 1437, "test": 360}
    train, test = (data[split].pixels.flatten(1) for split in ("train", "test"))
    assert float(train.min()) == 0.0
    assert float(train.max()) == 1.0
    seen = {tuple(row.tolist()) for row in train}
    assert not any(tuple(row.tolist()) in seen for row in test)
    assert all(len(images.labels.unique()) == 10 for images in data.values())


def test_text_targets_are_the_following_bytes() -> None:
    inputs, following = find("text").batch(3, seeded())
    assert inputs.shape == following.shape == (3, 16)
    assert torch.equal(inputs[:, 1:], following[:, :-1])
    assert text.python_prose().decode()


def test_the_transformer_does_not_look_ahead() -> None:
    torch.manual_seed(0)
    model = find("text", options=["length=64"]).model().eval()
    inputs = torch.randint(256, (1, 64))
    changed = inputs.clone()
    changed[0, 40] += 1
    before, after = model(inputs), model(changed % 256)
    torch.testing.assert_close(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


def test_text_reads_a_users_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"ab" * 5000)
    work = find("text", data=str(path))
    assert set(work.batch(4, seeded())[0].unique().tolist()) == {ord("a"), ord("b")}
    assert work.examples == 9000 // 16


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"short", "has 4 bytes to train"),
        (b"\xff\xfe" * 9000, "is not UTF-8 text: byte 0 is 0xff"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_the_text_is_named(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    path = tmp_path / "data.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=complaint) as caught:
        find("text", data=str(path))
    assert str(path) in str(caught.value)


def test_docstrings_stand_in_where_the_language_reference_is_stripped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    prose = text.python_prose.__wrapped__()
    assert len(prose) > 100_000
    assert b"Return" in prose


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'digit' is not known\. Did you mean 'digits'\? Known: .*text"):
        find("digit")
    with pytest.raises(UsageError, match="Did you mean 'cnn'"):
        find("digits", model="cn")
    with pytest.raises(UsageError, match="Did you mean 'lstm'"):
        text.Text("lstmm")


def test_data_for_a_class_that_takes_none_is_refused() -> None:
    with pytest.raises(UsageError, match="workload 'digits' takes no data"):
        find("digits", data="a.txt")


OWN = """
from dataclasses import dataclass
import torch
import pybatch
import helper_of_mine

class Mine(pybatch.Workload):
    name = "mine"
    def model(self): return torch.nn.Linear(2, 1)
    def batch(self, n, generator, split="train"): return torch.randn(n, 2, generator=generator)
    def loss(self, model, batch): return model(batch).square().mean() * helper_of_mine.SCALE

class Broken(Mine):
    def __init__(self): raise ValueError("no such disk")

class Lacking(pybatch.Workload):
    def model(self): return torch.nn.Linear(2, 1)

class Other: pass
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "helper_of_mine.py").write_text("SCALE = 2.0\n")
    path = tmp_path / "mymodel.py"
    path.write_text(OWN)
    return str(path)


def test_a_users_class_is_loaded_from_its_file_with_its_neighbours(own: str) -> None:
    work = find(f"{own}:Mine")
    assert isinstance(work, Workload)
    assert type(work).__module__.startswith(finding.FILE_MODULE)
    assert type(find(f"{own}:Mine")) is type(work)  # one module per file
    assert Session(work, CPU).loss(torch.ones(3, 2)).ndim == 0


@pytest.mark.parametrize(
    ("name", "error", "complaint"),
    [
        (":Mien", UsageError, r"Did you mean 'Mine'"),
        (":Other", UsageError, "not a subclass of pybatch.Workload"),
        (":Lacking", UsageError, r"lacks batch, loss"),
        (":Broken", WorkloadError, r"Broken\(\) .* raised ValueError: no such disk"),
        ("", UsageError, "names no class. Write path/file.py:Class"),
    ],
)
def test_what_is_wrong_with_a_users_class_is_said(own: str, name: str, error: type[Exception], complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        find(own + name)


def test_a_users_model_option_is_checked(own: str) -> None:
    with pytest.raises(UsageError, match="takes no model"):
        find(f"{own}:Mine", model="big")


def test_files_that_are_missing_or_do_not_run_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        find(f"{tmp_path}/absent.py:A")
    bad = tmp_path / "bad.py"
    bad.write_text("x = (\n")
    with pytest.raises(UsageError, match=r"cannot be loaded: SyntaxError: .*line 1"):
        find(f"{bad}:A")
    raises = tmp_path / "raises.py"
    raises.write_text("import not_there_at_all\n")
    with pytest.raises(UsageError, match="ModuleNotFoundError"):
        find(f"{raises}:A")


@pytest.mark.parametrize("count", [0, -3, 2.5, "many"])
def test_a_number_of_evaluation_examples_that_is_none_names_value_and_remedy(count: object) -> None:
    workload = find("quadratic")
    workload.evaluation_examples = count  # type: ignore[assignment]
    with pytest.raises(WorkloadError, match=f"evaluation_examples is {count!r}.*such as 512"):
        fixed_batches(workload, CPU)


@pytest.mark.parametrize(("name", "count"), [("digits", 512), ("scenes", 128), ("text", 128)])
def test_losses_are_taken_on_as_many_examples_as_the_workload_says(name: str, count: int) -> None:
    workload = find(name)
    train, test = fixed_batches(workload, CPU)
    assert [len(train[0]), len(test[0])] == [count, count]
    again = fixed_batches(workload, CPU)[0]
    assert torch.equal(train[0], again[0])
