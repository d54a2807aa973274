"""Exact per-example gradient norms against torch.func.vmap(grad) in float64."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pybatch.noise.per_example import ExampleRecorder


@pytest.fixture(autouse=True)
def one_thread():
    """Models of a few kilobytes: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def squared_error(output, target):
    """Each example's loss: [n]."""
    return (output - target).square().flatten(1).sum(1)


def truth(model, x, y, loss=squared_error):
    """|g_i|^2 per parameter, by a loop over examples that vmap runs at once."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def one(parameters, x, y):
        return loss(functional_call(model, parameters, (x[None],)), y[None]).sum()

    with sdpa_kernel(SDPBackend.MATH):  # the one that vmap has a rule for
        grads = vmap(grad(one), (None, 0, 0))(parameters, x, y)
    return {name: g.flatten(1).square().sum(1) for name, g in grads.items()}, {
        name: g.mean(0).square().sum() for name, g in grads.items()
    }


def measured(model, x, y, loss=squared_error, **options):
    recorder = ExampleRecorder(model, **options)
    with recorder.record(len(x)) as norms:
        loss(model(x), y).mean().backward()
    return norms


def assert_exact(model, x, loss=squared_error, rtol=1e-9, **options):
    """The norms of every parameter, and of the mean gradient, for random targets; the model's own gradient too."""
    model = model.double()
    with torch.no_grad():
        y = model(x)
    y = torch.randint(y.shape[-1], y.shape[:-1]) if loss is not squared_error else torch.randn_like(y)
    expected, mean = truth(model, x, y, loss)
    loss(model(x), y).mean().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    norms = measured(model, x, y, loss, **options)
    assert norms.by_parameter.keys() == expected.keys()
    for name, sq in norms.by_parameter.items():
        scale = float(expected[name].max()) + 1e-30
        torch.testing.assert_close(sq, expected[name], rtol=rtol, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(norms.mean_sq[name], mean[name], rtol=rtol, atol=rtol * scale)
        torch.testing.assert_close(model.get_parameter(name).grad, plain[name])
    torch.testing.assert_close(norms.total, sum(expected.values()), rtol=rtol, atol=0.0)
    return norms


def cross_entropy(output, target):
    return F.cross_entropy(output.flatten(0, -2), target.flatten(), reduction="none").view(len(output), -1).mean(1)


def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, groups=4, dilation=2, padding="same", bias=False),
        nn.BatchNorm2d(12).eval(),
        nn.ReLU(inplace=True),
        nn.Conv2d(
            12, 6, (1, 2), padding_mode="circular", padding=(0, 1), bias=False
        ),  # before a norm it has no gradient
        nn.InstanceNorm2d(6, affine=True),
        nn.Flatten(),
        nn.LazyLinear(4),
    )


class Transformer(nn.Module):
    """A causal language model with learned positions and an embedding tied to the read-out."""

    def __init__(self, vocabulary=11, width=8, length=6, tied=True, positions="slice"):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width, padding_idx=2)
        self.positions = nn.Embedding(length, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.randn(width))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.how = positions
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids):
        n, t = ids.shape
        if self.how == "slice":
            where = self.positions.weight[:t]
        elif self.how == "rows":
            where = self.positions(torch.arange(t)[None])
        else:
            where = self.positions(torch.arange(t))
        x = self.tokens(ids) + where
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, 2, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, -1)
        x = x + self.scale * self.out(mixed)
        return self.head(x + self.down(F.gelu(self.up(self.norm2(x)))))


@pytest.mark.parametrize("route", ["auto", "gram", "weight"])
def test_mlp(route):
    torch.manual_seed(0)
    assert_exact(mlp(), torch.randn(7, 6, dtype=torch.float64), route=route)


@pytest.mark.parametrize("route", ["auto", "gram", "weight"])
def test_cnn(route):
    torch.manual_seed(0)
    model, x = cnn().double(), torch.randn(5, 3, 9, 8, dtype=torch.float64)
    model(x)  # lazy shapes
    assert_exact(model, x, route=route)


@pytest.mark.parametrize("route", ["auto", "gram", "weight"])
@pytest.mark.parametrize("positions", ["slice", "rows", "plain"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformer(tied, positions, route):
    torch.manual_seed(0)
    ids = torch.randint(11, (5, 6))
    ids[0] = 4  # a token repeated all through an example
    model = Transformer(tied=tied, positions=positions)
    assert_exact(model, ids, loss=cross_entropy, route=route)
