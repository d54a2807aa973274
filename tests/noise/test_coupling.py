"""Losses that are no mean over examples are noticed, and others are not."""

import pytest
import torch
from cases.noise_models import Regression
from torch import nn
from torch.nn import functional as F

import pybatch.noise
from pybatch.noise.coupling import coupling
from pybatch.noise.measurement import measure_noise
from pybatch.workloads.base import Workload
from pybatch.workloads.digits import Digits
from pybatch.workloads.running.session import Session

pytestmark = pytest.mark.usefixtures("one_thread")


class Contrastive(Workload):
    """InfoNCE: the other examples of a batch are the negatives."""

    name = "contrastive"
    reference_batch = 4

    def model(self):
        return nn.Linear(8, 4)

    def batch(self, n, generator, split="train"):
        x = torch.randn(n, 8, generator=generator)
        return x, x + 0.1 * torch.randn(n, 8, generator=generator)

    def loss(self, model, batch):
        one, other = (F.normalize(model(x), dim=1) for x in batch)
        return F.cross_entropy(one @ other.T / 0.2, torch.arange(len(one)))


class Spread(Contrastive):
    """In-batch decorrelation (as of Barlow twins)."""

    def loss(self, model, batch):
        one, other = (model(x) for x in batch)
        return (one.T @ other / len(one) - torch.eye(4)).square().sum()


class Padded(Workload):
    """A mean over the tokens that labels do not leave out."""

    name = "padded"
    reference_batch = 4

    def model(self):
        return nn.Sequential(nn.Embedding(11, 8), nn.Dropout(0.5), nn.Linear(8, 11))

    def batch(self, n, generator, split="train"):
        ids = torch.randint(0, 11, (n, 6), generator=generator)
        length = torch.randint(1, 7, (n, 1), generator=generator)
        length[0] = 6
        length[-1] = 1
        return ids, ids.masked_fill(torch.arange(6) >= length, -100)

    def loss(self, model, batch):
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


class Weighed(Padded):
    def example_weights(self, batch):
        return (batch[1] != -100).sum(1)


class Single(Contrastive):
    """Dropout and batch statistics are no coupling of the loss."""

    def model(self):
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))

    def loss(self, model, batch):
        return (model(batch[0]) - model(batch[1])).square().sum(1).mean()


def said(work):
    session = Session(work, torch.device("cpu"))
    before, training = session.generator.get_state(), session.model.training
    notes = " ".join(note.text for note in coupling(session))
    assert (session.generator.get_state() == before).all()
    assert session.model.training == training
    assert all(p.grad is None for p in session.parameters)
    return notes


@pytest.mark.parametrize("kind", [Contrastive, Spread])
def test_a_loss_that_couples_the_batch_is_noticed(kind):
    assert "couples the examples" in said(kind())


def test_a_mean_over_tokens_is_noticed_where_they_are_not_counted():
    assert "example_weights" in said(Padded())
    assert "-100" in said(Padded())


@pytest.mark.parametrize("kind", [Regression, Weighed, Single, Digits])
def test_a_mean_over_examples_is_not(kind):
    assert said(kind()) == ""


def test_the_record_says_so():
    found = measure_noise(Contrastive(), device="cpu", time_budget=0.5, warmup_steps=2)
    assert any("couples the examples" in note.text for note in found.notes)


class Labelled(nn.Module):
    """A model that takes its labels, as those of transformers do."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 11)

    def forward(self, ids, labels=None):
        return F.cross_entropy(self.embed(ids).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("counted", [False, True])
def test_attach_notices_labels_that_are_left_out(counted):
    model = Labelled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"examples": "count", "accumulation": "weighted"} if counted else {}
    handle = pybatch.noise.attach(model, optimizer, "micro-batches", **options)
    ids = torch.randint(0, 11, (4, 6))
    for length in (3, 5):
        if counted:
            handle.count(4 * length)
        (model(ids, labels=ids.masked_fill(torch.arange(6) >= length, -100)) / 2).backward()
    optimizer.step()
    assert any("-100" in note.text for note in handle.noise.notes) != counted
