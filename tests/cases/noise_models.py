"""Small models and workloads for the noise sources, and norms by a float64 loop over examples."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pybatch.fits.noise import pair
from pybatch.noise.per_example import ExampleRecorder
from pybatch.workloads.base import Workload


class Regression(Workload):
    """x ~ N(0, I_d), no label noise, weights half a unit off everywhere: B_simple = d + 1 whatever the batch."""

    name = "regression"
    reference_batch = 8
    d = 63

    def model(self):
        model = nn.Linear(self.d, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def batch(self, n, generator, split="train"):
        return torch.randn(n, self.d, generator=generator)

    def loss(self, model, batch):
        return 0.5 * (model(batch)[:, 0] - 0.5 * batch.sum(1)).square().mean()


class Sequence(nn.Module):
    """Tokens in, one class out: an LSTM or a Transformer layer over a tied embedding."""

    def __init__(self, kind):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        if kind == "lstm":
            self.body = nn.LSTM(8, 8, batch_first=True)
        else:
            self.body = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, tokens):
        out = self.body(self.embed(tokens))
        out = out[0] if isinstance(out, tuple) else out
        return out.mean(1) @ self.embed.weight.T  # used twice: autograd adds both uses before a hook sees them


def images(n):
    return torch.randn(n, 1, 6, 6), torch.randint(0, 4, (n,))


def tokens(n):
    return torch.randint(0, 11, (n, 5)), torch.randint(0, 11, (n,))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 4))


def cnn():
    return nn.Sequential(nn.Conv2d(1, 4, 3, groups=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))


MODELS = {
    "mlp": (mlp, images),
    "cnn": (cnn, images),
    "transformer": (lambda: Sequence("transformer"), tokens),
    "lstm": (lambda: Sequence("lstm"), tokens),
}

loss_of = nn.functional.cross_entropy


def example_gradients(model, x, y):
    """One gradient per example: [examples, parameters] float64, and the widths of the parameters."""
    model = copy.deepcopy(model).double()
    x = x.double() if x.is_floating_point() else x
    params = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(x)):
        grads = torch.autograd.grad(loss_of(model(x[i : i + 1]), y[i : i + 1]), params)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows), [p.numel() for p in params]


def expected(members, weighted=False):
    """(|G|^2, tr Sigma) of one step from its members' example gradients, by sizes; [parameters' widths] apart."""
    means, sizes = torch.stack([m.mean(0) for m in members]), torch.tensor([float(len(m)) for m in members])
    sizes = sizes.double()
    k, total = len(members), sizes.sum()
    if weighted:
        share = sizes / total
        small, large, n_small, n_large = (share @ means.square()), (share @ means).square(), total / k, total
    else:
        n_small = k / (1 / sizes).sum()
        small, large, n_large = means.square().mean(0), means.mean(0).square(), k * n_small
    return pair(small, large, n_small, n_large)  # [parameters] each: summed as wanted


class Fixed(nn.Module):
    """A dropout layer that has been seen: the factors it applied, one example after the other."""

    def __init__(self, factors):
        super().__init__()
        self.rows = iter(factors)

    def forward(self, x):
        return x * next(self.rows)[None]


def watch_dropout(model):
    """Names of the dropout layers, and the factors [n, ...] that each applied last; filled by forward passes."""
    seen = {}

    def see(name):
        def hook(module, args, out):
            (x,) = args
            seen[name] = torch.where(x == 0, 0.0, out / x).detach().double()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(see(name))
    return seen


def masked_gradients(model, factors, x, y):
    """As `example_gradients`, with dropout as it was in the pass that made these factors."""
    model = copy.deepcopy(model)
    for name, own in factors.items():
        model.set_submodule(name, Fixed(own))
    return example_gradients(model, x, y)[0]


class Uphill(torch.optim.SGD):
    """Sharpness-aware steps (Foret et al. 2021): the gradient a little uphill, from a closure evaluated twice."""

    def step(self, closure):
        params = [p for group in self.param_groups for p in group["params"]]
        with torch.enable_grad():
            loss = closure()
        moved = [0.2 * p.grad / p.grad.norm() for p in params]
        with torch.no_grad():
            for p, by in zip(params, moved, strict=True):
                p.add_(by)
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for p, by in zip(params, moved, strict=True):
                p.sub_(by)
        super().step()
        return loss


def squared_error(output, target):
    """Each example's loss: [n]."""
    return (output - target).square().flatten(1).sum(1)


def measured(model, x, y, loss=squared_error, **options):
    recorder = ExampleRecorder(model, **options)
    if x.ndim > 1 and len(x) == x.shape[1]:  # a batch as large as its sequences are long would be refused
        recorder.probe(lambda n: loss(model(x[:n]), y[:n]).mean().backward(), (len(x) - 1, len(x)))
        model.zero_grad()
    with recorder.record(len(x)) as norms:
        loss(model(x), y).mean().backward()
    return norms


def cross_entropy(output, target):
    return F.cross_entropy(output.flatten(0, -2), target.flatten(), reduction="none").view(len(output), -1).mean(1)


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


def same(found, want, rel=1e-4):
    """The sums of a noise scale are those of its truth."""
    assert found["grad_sq"] == pytest.approx(want["grad_sq"], rel=rel, abs=rel * abs(want["trace"]))
    assert found["trace"] == pytest.approx(want["trace"], rel=rel)
