"""What users do to a model while its noise is measured: the right number, or an error that says what to do."""

import pytest
import torch
from cases.noise_models import example_gradients, expected, images, loss_of, mlp
from torch import nn
from torch.utils.checkpoint import checkpoint

import pybatch.noise
from pybatch.base.errors import UsageError
from pybatch.noise.sources import micro_batches


@pytest.fixture(autouse=True)
def seeded(one_thread):
    torch.manual_seed(0)


def attached(model=None, **options):
    model = model or mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, pybatch.noise.attach(model, optimizer, **options)


def passes(model, runs=None, between=lambda: None):
    """Two micro-batches, not stepped; returns their truth."""
    batches = [images(4) for _ in range(2)]
    truth = [float(part.sum()) for part in expected([example_gradients(model, *b)[0] for b in batches])]
    for x, y in batches:
        (loss_of((runs or model)(x), y) / 2).backward()
        between()
    return truth


def train(model, optimizer, steps=2, runs=None):
    truth = []
    for _ in range(steps):
        truth.append(passes(model, runs))
        optimizer.step()
        optimizer.zero_grad()
    return truth


def same(handle, truth):
    found = handle.noise
    means = [sum(column) / len(truth) for column in zip(*truth, strict=True)]
    assert (found.steps, found.skipped) == (len(truth), 0)
    assert [found.grad_sq, found.trace] == pytest.approx(means, rel=1e-4)


def test_what_is_no_model_or_no_optimizer_is_said():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for given, said in (
        ((nn.Linear,), "model is the class Linear"),
        ((optimizer, model), "model is SGD"),
        ((model, torch.optim.SGD), "optimizer is the class SGD"),
        ((model, "sgd"), "optimizer is 'sgd'"),
    ):
        with pytest.raises(UsageError, match=f"attach.*{said}.*attach.model, optimizer."):
            pybatch.noise.attach(*given)


@pytest.mark.parametrize("noticed", [True, False])
def test_gradients_cleared_in_place_begin_a_step_anew(monkeypatch, noticed):
    """A step thrown away with zero_grad(set_to_none=False); not noticing it gives a wrong number."""
    if not noticed:
        monkeypatch.setattr(micro_batches, "mark", lambda param: None)
        monkeypatch.setattr(micro_batches.MicroBatchNoise, "_printed", lambda handle: None)
    model, optimizer, handle = attached()
    passes(model)
    optimizer.zero_grad(set_to_none=False)
    truth = train(model, optimizer)
    if noticed:
        same(handle, truth)
    else:
        with pytest.raises(AssertionError):
            same(handle, truth)


def test_clipping_between_passes_is_left_out_and_said():
    model, optimizer, handle = attached()
    passes(model, between=lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    optimizer.step()
    optimizer.zero_grad()
    train(model, optimizer, 1)
    assert (handle.noise.steps, handle.noise.skipped) == (1, 1)
    assert any("left out: 1 step, because" in n.text for n in handle.noise.notes)


@pytest.mark.parametrize("light", [True, False])
@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_gradients_scaled_through_data_between_passes_are_left_out_and_said(light, factor, monkeypatch):
    """They keep their version: their values tell."""
    if not light:
        monkeypatch.setattr(micro_batches, "SMALL", 0)
    model, optimizer, handle = attached(source="micro-batches")
    assert handle._light == light

    def scale():
        for p in model.parameters():
            p.grad.data.mul_(factor)

    passes(model, between=scale)
    optimizer.step()
    optimizer.zero_grad()
    train(model, optimizer, 1)
    skipped = int(factor != 1.0)
    assert (handle.noise.steps, handle.noise.skipped) == (2 - skipped, skipped)
    assert any("left out: 1 step, because" in n.text for n in handle.noise.notes) == bool(skipped)


def test_gradients_left_from_the_step_before():
    """Of parameters that another optimizer should have cleared."""
    model = mlp()
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    handle = pybatch.noise.attach(model, optimizer)
    truth = train(model, optimizer, 3)[:1]
    assert (handle.noise.steps, handle.noise.skipped) == (1, 2)
    assert handle.noise.trace == pytest.approx(truth[0][1], rel=1e-4)
    with pytest.raises(UsageError, match="holds no parameter of this model"):
        pybatch.noise.attach(mlp(), optimizer)


def test_thawed_parameters_want_a_new_handle():
    model = mlp()
    model[1].weight.requires_grad_(False)
    model, optimizer, handle = attached(model)
    train(model, optimizer)
    model[1].weight.requires_grad_(True)
    with pytest.raises(UsageError, match=r"parameter '1\.weight' began to be trained after attach.*attach\(\) again"):
        train(model, optimizer)
    handle.detach()
    assert handle.noise.steps == 2
    handle = pybatch.noise.attach(model, optimizer)
    same(handle, train(model, optimizer))


def test_frozen_parameters_count_for_nothing_or_are_refused():
    model, optimizer, handle = attached()
    truth = train(model, optimizer)
    model[1].weight.requires_grad_(False)
    same(handle, truth + train(model, optimizer))
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    pybatch.noise.attach(model, optimizer, "adam-moments", every=2)
    train(model, optimizer)
    model[3].bias.requires_grad_(False)
    with pytest.raises(UsageError, match=r"'3\.bias' was frozen after attach"):
        train(model, optimizer)


class Checkpointed(nn.Module):
    def __init__(self, body, reentrant):
        super().__init__()
        self.body, self.reentrant = body, reentrant

    def forward(self, x):
        x = self.body[0](x).requires_grad_()
        return self.body[3](checkpoint(self.body[1:3], x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("kind", ["checkpoint", "reentrant", "compiled"])
def test_checkpoints_and_compiled_models(kind):
    model = mlp()
    runs = torch.compile(model, backend="aot_eager") if kind == "compiled" else Checkpointed(model, kind == "reentrant")
    _, optimizer, handle = attached(runs)
    same(handle, train(model, optimizer, runs=runs))


def test_gradients_that_are_not_accumulated_are_no_micro_batch():
    """torch.autograd.grad() of the parameters, for a penalty say: `.grad` did not change."""
    model, optimizer, handle = attached(examples="count")
    batches = [images(4) for _ in range(2)]
    truth = [float(part.sum()) for part in expected([example_gradients(model, *b)[0] for b in batches])]
    for x, y in batches:
        handle.count(4)
        torch.autograd.grad(loss_of(model(x), y), list(model.parameters()))
        (loss_of(model(x), y) / 2).backward()
    optimizer.step()
    same(handle, [truth])


def test_two_handles_and_detaching_twice():
    model, optimizer, handle = attached()
    other = pybatch.noise.attach(model, optimizer)
    truth = train(model, optimizer)
    other.detach()
    other.detach()
    same(other, truth)
    same(handle, truth + train(model, optimizer))


def test_an_empty_batch_and_evaluation_are_refused():
    model, _, _ = attached()
    with pytest.raises(UsageError, match=r"a batch without examples, of shape \(0, 1, 6, 6\)"):
        model(torch.zeros(0, 1, 6, 6))
    with pytest.raises(UsageError, match="the model is in evaluation mode"):
        passes(model.eval())
