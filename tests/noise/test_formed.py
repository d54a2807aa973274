"""The slow exact route of per-example norms: layers that have no other, against float64 gradients of torch.func."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.nn import functional as F

from pybatch.base.errors import UsageError
from pybatch.fits.noise import pair
from pybatch.noise.measurement import measure_noise
from pybatch.noise.per_example.feed import ExampleFeed
from pybatch.noise.per_example.formed import FormedFeed, fastest
from pybatch.workloads.base import Workload
from pybatch.workloads.running.session import Session

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


class Attention(nn.Module):
    """Self-attention of the library, sequence first or batch first."""

    def __init__(self, batch_first):
        super().__init__()
        self.body, self.first = nn.MultiheadAttention(8, 2, batch_first=batch_first), batch_first

    def forward(self, x):
        x = x if self.first else x.transpose(0, 1)
        out = self.body(x, x, x)[0]
        return out.mean(1 if self.first else 0)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body = kind(8, 8, batch_first=True)

    def forward(self, x):
        return self.body(x)[0][:, -1]


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.EmbeddingBag(11, 8, mode="mean")

    def forward(self, x):
        return self.body((x[:, :, 0] > 0).long() + 3 * (x[:, :, 1] > 0))


class Merged(nn.Module):
    """Examples and positions in one dimension, as many language models have them."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 8)

    def forward(self, x):
        return self.body(x.reshape(-1, 8)).relu().view(len(x), -1, 8).mean(1)


LAYERS = {
    "attention": lambda: Attention(True),
    "attention, sequence first": lambda: Attention(False),
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "transposed convolution": lambda: nn.Sequential(
        nn.ConvTranspose1d(5, 3, 3, stride=2), nn.Flatten(), nn.Linear(51, 8)
    ),
    "bag": Bag,
    "prelu": lambda: nn.Sequential(nn.Linear(8, 8), nn.PReLU(8 - 3), nn.Flatten(), nn.Linear(40, 8)),
    "examples and positions in one": Merged,
}


class Work(Workload):
    """Sequences [n, 5, 8] in, one of eight classes out."""

    name = "layers"
    reference_batch = 4

    def __init__(self, layer):
        self.layer = layer

    def model(self):
        return LAYERS[self.layer]()

    def batch(self, n, generator, split="train"):
        return torch.randn(n, 5, 8, generator=generator), torch.randint(0, 8, (n,), generator=generator)

    def loss(self, model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])


def truth(session, batch):
    """Squared norms [n] and mean gradient by parameter, in float64."""
    model = copy.deepcopy(session.model).double()
    inside = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x, y):
        return F.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    found = [grad(loss)(inside, x.double(), y) for x, y in zip(*batch, strict=True)]
    squared = {name: torch.stack([g[name].square().sum() for g in found]) for name in inside}
    return squared, {name: torch.stack([g[name] for g in found]).mean(0) for name in inside}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("chunk", [2, 100])
def test_layers_without_a_fast_route_are_formed_one_by_one(layer, chunk):
    session = Session(Work(layer), CPU)
    feed = fastest(session, layers=True)()
    assert isinstance(feed, FormedFeed)
    feed._chunk = chunk
    batches = [session.batch(5), session.batch(5)]
    for batch in batches:
        feed.micro_batch(session.backward, 5, batch=batch)
    made = [p.grad for _, p in feed.named]
    feed.group()
    found = [truth(session, batch) for batch in batches]
    for i, (name, _) in enumerate(feed.named):
        mean = (found[0][1][name] + found[1][1][name]) / 2
        torch.testing.assert_close(made[i].double() / 2, mean, rtol=1e-4, atol=1e-6)
        small = torch.cat([f[0][name] for f in found]).mean()
        own = next(entry for entry in feed.noise.layers if entry.name == name)
        grad_sq, trace = pair(float(small), float(mean.square().sum()), 1, 10)
        assert own.grad_sq == pytest.approx(grad_sq, rel=1e-3, abs=1e-6)
        assert own.trace == pytest.approx(trace, rel=1e-3, abs=1e-6)
    assert any("which is slow" in note.text for note in feed.noise.notes)


def test_a_loop_takes_over_where_vmap_has_no_rule():
    """And both give the same."""
    session = Session(Work("lstm"), CPU)
    batch, found = session.batch(4), []
    for vmapped in (True, False):
        feed = FormedFeed(session, False, "")
        feed._vmapped = vmapped
        feed.micro_batch(session.backward, 4, batch=batch)
        found.append(feed._small[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-8)


def test_the_fast_route_stays_where_there_is_one():
    class Plain(Work):
        def model(self):
            return nn.Sequential(nn.Flatten(), nn.Linear(40, 8))

    feed = fastest(Session(Plain(""), CPU))()
    assert isinstance(feed, ExampleFeed)
    assert not isinstance(feed, FormedFeed)


def test_batch_statistics_are_refused_on_this_route_too():
    class Normed(Work):
        def model(self):
            return nn.Sequential(Recurrent(nn.LSTM), nn.BatchNorm1d(8))

    with pytest.raises(UsageError, match="BatchNorm"):
        fastest(Session(Normed(""), CPU))


def test_a_measurement_goes_that_way():
    found = measure_noise(Work("gru"), device="cpu", source="per-example", time_budget=1.5, warmup_steps=2)
    assert (found.source, found.small_batch) == ("per-example", 1)
    assert found.steps > 0
