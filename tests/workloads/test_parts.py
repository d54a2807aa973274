"""Workloads made of a model, a data set, a loss and an optimizer."""

import hashlib
import re

import pytest
import torch
from cases.paths import ROOT
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from pybatch import Workload
from pybatch.base.errors import UsageError, WorkloadError
from pybatch.training.fingerprint import fingerprint
from pybatch.workloads.running.finding import find
from pybatch.workloads.running.packing import pack
from pybatch.workloads.running.session import Session, fixed_batches

CPU = torch.device("cpu")
X = torch.arange(60.0).reshape(20, 3)
Y = torch.arange(20) % 2


def make():
    return nn.Linear(3, 2)


def by_hand(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def parts(**more):
    given = {"model": make, "train": TensorDataset(X, Y), "loss": nn.functional.cross_entropy}
    return Workload.from_parts(**(given | more))


class Noisy(Dataset):
    """An augmentation of torch's generator."""

    def __len__(self):
        return 20

    def __getitem__(self, i):
        return X[i] + torch.randn(3), Y[i]


def test_examples_are_drawn_with_replacement_and_collated():
    def collate(rows):
        assert isinstance(rows, list)
        return {"both": default_collate(rows), "count": len(rows)}

    work = parts(collate_fn=collate, loss=lambda model, batch: by_hand(model, batch["both"]))
    drawn = work.batch(50, torch.Generator().manual_seed(0))
    x, y = drawn["both"]
    assert (len(x), drawn["count"]) == (50, 50)
    rows = (x[:, 0] / 3).long()
    assert torch.equal(x, X[rows])
    assert torch.equal(y, Y[rows])
    assert 10 < len(set(rows.tolist())) < 20  # 50 draws of 20 leave out 1.5 on average


@pytest.mark.parametrize("data", [TensorDataset(X, Y), Noisy(), list(zip(X, Y, strict=True))])
def test_a_seed_says_what_is_drawn_augmentations_too(data):
    work = parts(train=data)
    first, same, other = (work.batch(8, torch.Generator().manual_seed(s))[0] for s in (3, 3, 4))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_batch_for_its_time_alone_repeats_examples(monkeypatch):
    monkeypatch.setattr("pybatch.workloads.parts._DISTINCT", 32)
    asked = []

    class Counted(TensorDataset):
        def __getitem__(self, i):
            asked.append(i)
            return super().__getitem__(i)

    work = parts(train=Counted(X, Y), reference_batch=4)
    x, _ = work.batch(1000, torch.Generator().manual_seed(0))
    assert (len(x), len(asked)) == (1000, 32)
    assert torch.equal(x[:32], x[32:64])


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.functional.cross_entropy])
def test_a_criterion_is_taken_as_one_and_a_function_as_it_is(loss):
    batch = (X, Y)
    torch.manual_seed(0)
    model = make()
    wanted = by_hand(model, batch)
    assert torch.equal(parts(loss=loss).loss(model, batch), wanted)
    assert torch.equal(parts(loss=by_hand).loss(model, batch), wanted)
    with pytest.raises(UsageError, match="no pairs"):
        parts(loss=loss).loss(model, X)


def test_a_module_is_copied():
    module = make()
    work = parts(model=module)
    first, second = work.model(), work.model()
    assert first is not second is not module
    assert torch.equal(first.weight, module.weight)


def test_what_was_given_is_what_is_run():
    work = parts(
        test=TensorDataset(X + 100, Y),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.3),
        schedule=lambda optimizer, steps: torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=steps),
        name="mine",
        unit="images",
        target={"train": 0.2},
        reference_batch=5,
    )
    session = Session(work, CPU)
    info = session.info
    assert (info.name, info.unit, info.examples, info.target) == ("mine", "images", 20, {"train": 0.2})
    assert (info.optimizer, info.learning_rate, info.reference_batch) == ("sgd", 0.3, 5)
    assert session.schedule(session.optimizer(), 7).total_iters == 7
    train, test = fixed_batches(work, CPU)
    assert len(train[0]) == 20  # an evaluation of no more than there is
    assert float(test[0].min()) >= 100
    with pytest.raises(UsageError, match="without test data"):
        parts().batch(2, torch.Generator(), "test")


def test_the_loader_is_a_real_one_without_an_end():
    work = parts(num_workers=2, loader_options={"prefetch_factor": 4})
    loader = work.loader(8)
    assert isinstance(loader, DataLoader)
    assert (loader.num_workers, loader.prefetch_factor, loader.batch_size) == (2, 4, 8)
    assert work.loader(8, 1).num_workers == 1
    batches = iter(work.loader(8, 0))
    assert [len(next(batches)[0]) for _ in range(5)] == [8] * 5  # two epochs and more
    assert Workload.loader(work, 8) is None


class Stream(IterableDataset):
    def __iter__(self):
        yield X[0], Y[0]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"train": DataLoader(TensorDataset(X, Y))}, r"train=loader\.dataset"),
        ({"train": Stream()}, "Stream without indices"),
        ({"train": []}, "train has no example"),
        ({"train": None}, "NoneType without indices"),
        ({"test": Stream()}, "test is a Stream"),
        ({"model": "mlp"}, "model is a str"),
        ({"loss": None}, "loss is a NoneType"),
        ({"num_workers": -1}, "num_workers -1"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused_with_the_remedy(more, said):
    with pytest.raises(UsageError, match=said):
        parts(**more)


def test_another_loss_is_another_workload():
    one = parts(test=TensorDataset(X, Y), loss=lambda model, batch: by_hand(model, batch))
    same = parts(test=TensorDataset(X, Y), loss=lambda model, batch: by_hand(model, batch))
    other = parts(test=TensorDataset(X, Y), loss=lambda model, batch: 2 * by_hand(model, batch))
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(one)
    del same


FILE = """
import torch
import pybatch

def make():
    return torch.nn.Linear(3, 2)

data = [(torch.zeros(3), 0)] * 8
ready = pybatch.Workload.from_parts(model=make, train=data, loss=torch.nn.CrossEntropyLoss(), name="ready")

def made():
    return pybatch.Workload.from_parts(model=make, train=data, loss=torch.nn.CrossEntropyLoss(), name="made")

def broken():
    raise OSError("no such folder")

def nothing():
    return 3
"""


def test_the_command_line_takes_what_a_file_has_made(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    for name in ("ready", "made"):
        info = Session(find(f"{path}:{name}"), CPU).info
        assert info.name == name
        assert info.file_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UsageError, match=r"--model: .* made in its file"):
        find(f"{path}:ready", model="mlp")
    with pytest.raises(UsageError, match="nor a workload, and makes none"):
        find(f"{path}:nothing")
    with pytest.raises(WorkloadError, match=r"broken\(\) .* OSError: no such folder"):
        find(f"{path}:broken")


def test_the_lines_of_code_in_the_docs_are_counted():
    text = (ROOT / "docs" / "from_parts.md").read_text()
    table = re.findall(r"^\| (?:a|an) [^|]+\| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    blocks = re.findall(
        r"```python\n(.*?)```", text[text.index("### A data set") : text.index("## Trainers")], re.DOTALL
    )
    counts = [sum(bool(line.strip()) for line in block.splitlines()) for block in blocks]
    assert [int(number) for row in table for number in row] == counts


def test_it_goes_to_other_processes():
    pytest.importorskip("cloudpickle")
    opened = pack(parts(optimizer=lambda params: torch.optim.SGD(params, lr=0.3))).open()
    assert Session(opened, CPU).info.learning_rate == 0.3
