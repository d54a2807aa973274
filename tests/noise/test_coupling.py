"""Losses that are no mean over examples are noticed, and others are not."""

import dataclasses

import pytest
import torch
from cases.noise_models import Regression
from cases.verdicts import capacity
from torch import nn
from torch.nn import functional as F

import pybatch.noise
from pybatch.answer.course import course_of
from pybatch.answer.verdict import advise
from pybatch.base.errors import UsageError
from pybatch.noise.coupling import coupling
from pybatch.noise.measurement import measure_noise
from pybatch.records import Run
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


class Summed(Regression):
    """The sum over examples, where a mean is wanted."""

    def loss(self, model, batch):
        return len(batch) * super().loss(model, batch)


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


class Sparse(Padded):
    """An embedding whose gradient torch keeps sparse."""

    def model(self):
        return nn.Sequential(nn.Embedding(11, 8, sparse=True), nn.Linear(8, 11))


def test_a_sparse_gradient_is_looked_at_and_then_refused_with_its_remedy():
    assert "example_weights" in said(Sparse())
    with pytest.raises(UsageError, match="Use sparse=False"):
        measure_noise(Sparse(), device="cpu", time_budget=0.5, warmup_steps=2)


class Unsteady(Regression):
    learning_rate = 1e6

    def optimizer(self, params):
        return torch.optim.SGD(params, lr=self.learning_rate)

    def loss(self, model, batch):
        return (model(batch)[:, 0] - 0.5 * batch.sum(1)).square().add(1.0).log().mean()  # grows, and stays finite


def test_a_warm_up_that_diverged_is_told_and_predicts_nothing():
    """The loss was 303,000 where it had been 0.73, and its scale gave a critical batch."""
    found = measure_noise(Unsteady(), device="cpu", time_budget=1.0, warmup_steps=20)
    assert "the warm-up diverged: training loss" in found.misled
    assert "Give a learning rate below 1e+06" in found.misled
    assert measure_noise(Regression(), device="cpu", time_budget=0.5, warmup_steps=20).misled is None


def test_a_sum_is_called_so():
    assert "is a sum over the examples" in said(Summed())
    assert "Take the mean" in said(Summed())


@pytest.mark.parametrize("kind", [Contrastive, Summed])
def test_a_scale_that_predicts_no_critical_batch_gives_none(kind):
    found = measure_noise(kind(), device="cpu", time_budget=0.5, warmup_steps=2)
    taken = dataclasses.replace(found, b_simple=100.0, low=90.0, high=110.0, status="resolved")
    for noise in (taken, dataclasses.replace(taken, b_simple=None, high=None, status="lower_bound")):
        verdict = advise(capacity(), noise, None)
        assert (verdict.critical_batch, verdict.critical_low, verdict.best_batch) == (None, None, None)
        assert found.misled in verdict.why("critical_batch").text
        assert "narrow the noise scale" not in verdict.text
    with pytest.raises(UsageError, match="no schedule comes from this record: the loss"):
        course_of(Run("2026-12-01", None, noise=taken))


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
