"""B_noise by Hessian-vector products against closed forms and the exact Hessian; what measure_noise measures beside."""

import math
import time

import numpy as np
import pytest
import torch
from cases.noise_models import MODELS, loss_of
from torch import nn

from pybatch.base.errors import UsageError
from pybatch.noise.hessian import HessianNoise, dot, products
from pybatch.noise.measurement import measure_noise
from pybatch.records import Environment, Run
from pybatch.workloads.base import Workload
from pybatch.workloads.running.session import Session

ENVIRONMENT = Environment("3", "linux", "0", None, None, None, None, 1, 0, "test")


class Anisotropic(Workload):
    """x ~ N(0, diag(1/i)), i to 20, weights 1 off everywhere, labels with noise of variance 1."""

    name = "anisotropic"
    reference_batch = 16
    scales = 1 / torch.arange(1, 21)

    def model(self):
        model = nn.Linear(20, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def batch(self, n, generator, split="train"):
        x = torch.randn(n, 20, generator=generator) * self.scales.sqrt()
        return x, x.sum(1) + torch.randn(n, generator=generator)

    def loss(self, model, batch):
        return 0.5 * (model(batch[0])[:, 0] - batch[1]).square().mean()

    def truth(self):
        """(tr Sigma, |G|^2, B_noise) in closed form with e = 1 and sigma = 1."""
        lam = self.scales.double()
        excess = float(lam.sum()) + 1.0
        grad_sq = float((lam**2).sum())
        trace = grad_sq + excess * float(lam.sum())
        return trace, grad_sq, 1 + excess * float((lam**2).sum()) / float((lam**3).sum())


@pytest.fixture(autouse=True)
def seeded(one_thread):
    torch.manual_seed(0)


@pytest.mark.usefixtures("wide")
def test_anisotropic_closed_form():
    """Both noise scales at once: they differ here, and each interval holds its own truth."""
    trace, grad_sq, b_noise = Anisotropic().truth()
    b_simple = trace / grad_sq
    assert b_noise == pytest.approx(7.1, abs=0.1)
    assert b_simple == pytest.approx(11.4, abs=0.1)
    held = []
    for seed in range(5):
        found = measure_noise(Anisotropic(), device="cpu", seed=seed, warmup_steps=0, hessian=True, time_budget=8)
        assert (found.status, found.hessian.status) == ("resolved", "resolved")
        held += [found.low <= b_simple <= found.high, found.hessian.low <= b_noise <= found.hessian.high]
    assert sum(held) >= 9
    run = Run("2026-01-01T00:00:00+00:00", ENVIRONMENT, noise=found)
    assert Run.from_json(run.to_json()) == run
    assert found.hessian.high < b_simple  # one taken for the other would be seen


def test_pairs_are_unbiased():
    """The means over many pairs are G^T H G and tr(H Sigma), for more than one micro-batch per gradient too."""
    lam = Anisotropic.scales.double()
    excess = float(lam.sum()) + 1.0
    grad = float((lam**3).sum())
    truth = np.array([grad, grad + excess * float((lam**2).sum())])
    for k in (1, 3):
        noise = HessianNoise(Session(Anisotropic(), torch.device("cpu"), seed=k), 8, k)
        for _ in range(300):
            noise.pair()
        rows = noise._pairs.rows
        means = rows / rows[:, :1]
        error = means[:, 1:].std(axis=0) / math.sqrt(len(rows))
        assert (np.abs(means[:, 1:].mean(axis=0) - truth) < 4 * error).all()
        assert (error < 0.2 * truth).all()


@pytest.mark.parametrize("name", MODELS)
def test_products_with_the_exact_hessian(name):
    make, draw = MODELS[name]
    model = make().double()
    x, y = draw(4)
    x = x.double() if x.is_floating_point() else x
    params = list(model.parameters())
    flat = torch.cat([p.detach().flatten() for p in params])
    names, shapes = [n for n, _ in model.named_parameters()], [p.shape for p in params]

    def loss_at(vector):
        parts = vector.split([s.numel() for s in shapes])
        values = {n: v.view(s) for n, v, s in zip(names, parts, shapes, strict=True)}
        return loss_of(torch.func.functional_call(model, values, (x,)), y)

    def slope(vector):
        vector = vector.clone().requires_grad_()
        return torch.autograd.grad(loss_at(vector), vector)[0]

    directions = torch.randn(2, len(flat), dtype=torch.float64)
    split = [[d.view(s) for d, s in zip(v.split([s.numel() for s in shapes]), shapes, strict=True)] for v in directions]
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        found = products(loss_of(model(x), y), params, split)
        for v, own, parts in zip(directions, found, split, strict=True):
            h = 1e-5
            want = (slope(flat + h * v) - slope(flat - h * v)) / (2 * h)
            got = torch.cat([g.flatten() for g in own])
            assert float((got - want).norm()) < 1e-5 * float(want.norm())
            assert float(dot(parts, own)) == pytest.approx(float(v @ got), rel=1e-9)


class Saddle(Anisotropic):
    """The loss falls along its gradient's direction faster and faster: negative curvature."""

    def loss(self, model, batch):
        return -super().loss(model, batch)


class Fused(Anisotropic):
    def model(self):
        return nn.Linear(20, 1)

    def loss(self, model, batch):
        return Once.apply(model(batch[0])).square().mean()


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad


def test_negative_curvature_and_no_second_derivative_have_a_reason():
    found = HessianNoise(Session(Saddle(), torch.device("cpu")), 16, 1)
    for _ in range(150):
        found.pair()
    result = found.result
    assert (result.status, result.b_noise) == ("unresolved", None)
    assert "not convex" in result.reason
    early = HessianNoise(Session(Saddle(), torch.device("cpu")), 16, 1).run(0.0, 0.3)
    assert (early.status, early.steps) == ("unresolved", 0)
    assert "time budget ended" in early.reason
    with pytest.raises(UsageError, match="without a second derivative"):
        HessianNoise(Session(Fused(), torch.device("cpu")), 16, 1).pair()


class Dropping(Anisotropic):
    """Dropout of half the inputs in front: far more noise in training mode than in evaluation mode."""

    def model(self):
        return nn.Sequential(nn.Dropout(0.5), super().model())


def test_both_modes():
    """Evaluation mode gives the closed form; training mode holds dropout's noise on top."""
    trace, grad_sq, _ = Anisotropic().truth()
    found = measure_noise(Dropping(), device="cpu", warmup_steps=0, mode="both", time_budget=16)
    assert found.eval_mode.low <= trace / grad_sq <= found.eval_mode.high
    assert found.low > found.eval_mode.high
    assert any("dropout was active" in n.text for n in found.notes)
    alone = measure_noise(Dropping(), device="cpu", warmup_steps=0, mode="eval")
    assert alone.low <= trace / grad_sq <= alone.high
    assert alone.eval_mode is None
    assert not any("dropout was active" in n.text for n in alone.notes)
    assert any("evaluation mode" in n.text for n in alone.notes)


def test_layers_and_preconditioned():
    """By hooks: the same total, every parameter, and P from the warm-up's AdamW."""
    options = {"device": "cpu", "warmup_steps": 20, "time_budget": 20}
    plain = measure_noise(Anisotropic(), **options)
    found = measure_noise(Anisotropic(), layers=True, preconditioned=True, **options)
    assert found.low <= plain.high
    assert plain.low <= found.high
    (layer,) = found.layers
    assert (layer.name, layer.status, layer.b_simple) == ("weight", "resolved", pytest.approx(found.b_simple))
    assert found.preconditioned.status == "resolved"
    assert found.preconditioned.b_noise != pytest.approx(found.b_simple, rel=0.05)
    assert any("experimental" in n.text for n in found.notes)
    bare = measure_noise(Anisotropic(), device="cpu", warmup_steps=0, preconditioned=True, time_budget=2)
    assert (bare.status, bare.preconditioned.status) == ("resolved", "unresolved")
    assert "moments need a step before" in bare.preconditioned.reason


class Still(Anisotropic):
    """Every batch is the same one."""

    def batch(self, n, generator, split="train"):
        return super().batch(n, torch.Generator().manual_seed(0), split)


def test_equal_batches_end_early_without_a_number():
    start = time.monotonic()
    found = measure_noise(Still(), device="cpu", warmup_steps=0, time_budget=600)
    assert time.monotonic() - start < 300
    assert (found.status, found.b_simple) == ("unresolved", None)
    assert "equal within rounding" in found.notes[0].text


def test_bad_options():
    with pytest.raises(UsageError, match="mode 'test'"):
        measure_noise(Anisotropic(), device="cpu", mode="test")
    with pytest.raises(UsageError, match="without a preconditioner"):
        measure_noise(Anisotropic(), device="cpu", source="per-example", preconditioned=True)
