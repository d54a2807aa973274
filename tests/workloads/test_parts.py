"""Workloads made of a model, a data set, a loss and an optimizer."""

import functools
import hashlib
import re

import pytest
import torch
from cases.paths import ROOT
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from pybatch import Workload
from pybatch.base.errors import UsageError, WorkloadError
from pybatch.capacity.step import TrainingStep
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


class Counted(TensorDataset):
    """Rows as dicts, and how many were read."""

    asked = 0

    def __getitem__(self, i):
        self.asked += 1
        x, y = super().__getitem__(i)
        return {"x": x, "y": y}


def popped(rows):
    """As collators do that take a key out, and pad into lists."""
    y = torch.tensor([row.pop("y") for row in rows])
    return {"x": torch.stack([row["x"] for row in rows]), "y": y, "names": [f"{v}" for v in y.tolist()]}


class Whole(Counted):
    """A data set that makes its batches itself."""

    def __getitems__(self, index):
        return {"x": X[index], "y": Y[index], "names": [""] * len(index)}


def test_a_batch_for_its_time_alone_repeats_examples(monkeypatch):
    monkeypatch.setattr("pybatch.workloads.parts._DISTINCT", 8)
    data = Counted(X, Y)
    for work in (parts(train=data, collate_fn=popped), parts(train=Whole(X, Y), collate_fn=lambda rows: rows)):
        for n in (20, 3):
            found = Session(work, CPU).timed_batch(n)
            assert {len(found[name]) for name in ("x", "y", "names")} == {n}
            assert torch.equal(found["x"][8:16], found["x"][: len(found["x"][8:16])])
    assert data.asked == 8 + 3


def test_a_batch_of_any_size_is_of_so_many_draws():
    """The mean of n draws has the variance of one over n: a batch that repeats 2048 would have twice that."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20_000, 512, generator=generator)
    work = parts(train=TensorDataset(rows - rows.mean(0)), loss=lambda model, batch: batch[0].mean())
    session = Session(work, CPU)
    assert float(session.batch(4096)[0].mean(0).var()) * 4096 == pytest.approx(1, abs=0.25)


def test_capacity_asks_for_a_batch_whose_time_alone_counts(monkeypatch):
    monkeypatch.setattr("pybatch.workloads.parts._DISTINCT", 8)
    data = Counted(X, Y)
    step = TrainingStep(Session(parts(train=data, loss=lambda model, batch: model(batch["x"]).mean()), CPU))
    step.load(500)
    step()
    assert data.asked == 8


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


class Focal(nn.Module):
    """A criterion of a user's own, whose arguments tell nothing."""

    def forward(self, a, b):
        return nn.functional.cross_entropy(a, b)


class OfBatch(nn.Module):
    """A loss of (model, batch) that is a module."""

    def forward(self, model, batch):
        return by_hand(model, batch)


class Untold(nn.Module):
    """One whose arguments do not say so."""

    def forward(self, m, b):
        return by_hand(m, b)


def own(logits, targets):
    return nn.functional.cross_entropy(logits, targets)


def untold(a, b):
    return nn.functional.cross_entropy(a, b)


def weighed(factor, model, batch):
    return factor * by_hand(model, batch)


@pytest.mark.parametrize(
    "loss",
    [
        functools.partial(nn.functional.cross_entropy, label_smoothing=0.0),
        functools.partial(functools.partial(nn.functional.cross_entropy, weight=None), reduction="mean"),
        functools.partial(nn.CrossEntropyLoss()),
        functools.partial(weighed, 1.0),
        nn.CrossEntropyLoss().forward,
        Focal(),
        OfBatch(),
        functools.partial(own),
        own,
        lambda m, b: by_hand(m, b),
    ],
)
def test_what_a_loss_is_of_is_told_from_its_arguments(loss):
    torch.manual_seed(0)
    model = make()
    assert torch.equal(parts(loss=loss).loss(model, (X, Y)), by_hand(model, (X, Y)))


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (Untold(), r"Untold was taken for a criterion .*TypeError.* of \(model, batch\), give lambda"),
        (untold, r"untold was taken for a function of \(model, batch\).* of \(output, target\), give lambda"),
    ],
)
def test_a_loss_that_was_taken_for_another_kind_is_told_how_to_say_it(loss, said):
    with pytest.raises(UsageError, match=said):
        Session(parts(loss=loss), CPU).loss((X, Y))


def test_a_model_that_gives_several_outputs_is_told_what_to_give():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make()

        def forward(self, x):
            return self.inner(x), x

    said = r"the model gives tuple, and loss .* takes a tensor .* Give a function of \(model, batch\) that picks it"
    for loss in (nn.CrossEntropyLoss(), nn.functional.cross_entropy):
        with pytest.raises(UsageError, match=said):
            Session(parts(model=Several, loss=loss), CPU).loss((X, Y))

    def slips(output, target):
        return output[0].lnog()

    with pytest.raises(WorkloadError, match=r"no attribute 'lnog', at .*: `return output\[0\]\.lnog\(\)`"):
        Session(parts(model=Several, loss=slips), CPU).loss((X, Y))


def test_a_partial_loss_is_another_one_by_its_arguments():
    def source(x):
        return parts(loss=functools.partial(nn.functional.cross_entropy, label_smoothing=x)).source()

    assert source(0.1) == source(0.1) != source(0.2)


def test_a_module_is_copied_at_once():
    module = make()
    before = module.weight.detach().clone()
    work = parts(model=module)
    nn.init.zeros_(module.weight)
    first, second = work.model(), work.model()
    assert first is not second is not module
    assert torch.equal(first.weight, before)


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
        ({"train": {"x": X}}, "train is dict, .*TensorDataset"),
        ({"loss": lambda one: one}, "cannot be called with two arguments"),
        ({"loss": functools.partial(by_hand, 1)}, "by_hand.* cannot be called with two"),
        ({"num_workers": -1}, "num_workers -1"),
        ({"num_workers": True}, "num_workers True"),
        ({"targets": {"train": 1}}, "'targets' is not known. Did you mean 'target'"),
        ({"target": 3}, "target is 3. Give a dict"),
        ({"target": {"train": "low"}}, "target is .*low"),
        ({"better": "higher"}, "better is 'higher'"),
        ({"optimizer": torch.optim.SGD(make().parameters(), lr=1)}, "optimizer is a SGD.* makes a SGD"),
        ({"collate_fn": 1}, "collate_fn is a int"),
        ({"reference_batch": 0}, "reference_batch is 0: it must be"),
        ({"evaluation_examples": 0}, "evaluation_examples is 0: give"),
        ({"name": ""}, "name is '': it must be"),
        ({"loader_options": [1]}, "loader_options is"),
        ({"loader_options": {"batch_size": 4}}, "batch_size=4 is not free. Leave it out"),
        ({"loader_options": {"shuffle": True}}, "shuffle=True is not free. Leave it out"),
        ({"loader_options": {"collate_fn": 1}}, r"Give from_parts\(collate_fn=\)"),
        ({"loader_options": {"prefetch": 4}}, "'prefetch' is not known. Did you mean 'prefetch_factor'"),
        ({"loader_options": {"prefetch_factor": -1}}, "makes no DataLoader of them"),
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
