"""A training under observation: what is found, measured and told, and that it goes on to the bit as without."""

import copy
import math

import pytest
import torch
from torch import nn

from pybatch.jobs.options import WatchOptions
from pybatch.jobs.watch import Enough, Watching
from pybatch.records import Ceilings
from pybatch.watch import replay

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Replays long enough to be right, not to be exact."""
    monkeypatch.setattr("pybatch.capacity.timing._QUANTUM_S", 0.01)
    monkeypatch.setattr(replay, "measure_ceilings", lambda *given: Ceilings(1e11, 1e10))


class Net(nn.Module):
    """With all that a step changes beside the parameters: buffers, random numbers, attributes."""

    def __init__(self, norm=True):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24) if norm else nn.Identity(), nn.ReLU())
        self.head = nn.Linear(24, 3)
        self.calls, self.seen = 0, []

    def forward(self, x, scale=1.0):
        self.calls += 1
        self.seen.append(len(x))
        return {"logits": self.head(nn.functional.dropout(self.body(x), 0.2, self.training)) * scale}


def batch(n=16):
    x = torch.randn(n, 12)
    return x, (x[:, 0] > 0).long()


def train(model, optimizer, steps, *, micro=1, n=16, schedule=None, scaler=None, clip=False, after=lambda step: None):
    """A loop as scripts have it."""
    for step in range(steps):
        optimizer.zero_grad()
        for _ in range(micro):
            x, y = batch(n if step % 20 != 19 else n // 2)  # an epoch's last batch is smaller
            loss = nn.functional.cross_entropy(model(x)["logits"], y) / micro
            (scaler.scale(loss) if scaler else loss).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        if schedule:
            schedule.step()
        if step % 10 == 9:
            model.eval()
            with torch.no_grad():
                model(batch(40)[0])
            model.train()
        after(step)


def watched(work, **options):
    """The run of a training, and what was said."""
    said = []
    watching = Watching(WatchOptions(**{"time_budget": 0.3} | options), say=said.append)
    watching.start()
    try:
        work()
    except Enough:
        pass
    except BaseException:
        watching.finish(measure=False)
        raise
    run = watching.finish()
    assert watching.fault is None, watching.fault
    return run, said, watching


def everything(model, optimizer, schedule=None):
    """All that a training has, by name."""
    found = {f"model.{name}": value for name, value in model.state_dict().items()}
    found |= {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    for i, state in optimizer.state_dict()["state"].items():
        found |= {f"state.{i}.{name}": value for name, value in state.items()}
    for i, group in enumerate(optimizer.param_groups):
        found |= {f"group.{i}.{name}": value for name, value in group.items() if name != "params"}
    found |= {"calls": model.calls, "seen": list(model.seen), "rng": torch.get_rng_state(), "mode": model.training}
    return found | ({"schedule": schedule.state_dict()} if schedule else {})


def same(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, two[name]), name
        else:
            assert value == two[name], name


OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "amsgrad": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True, foreach=True),
    "fused": lambda params: torch.optim.Adam(params, lr=torch.tensor(0.01), fused=True),
    "pybatch": lambda params: __import__("pybatch.optim").optim.AdamW(params, lr=0.01, max_grad_norm=1.0),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.001, centered=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_all_is_put_back_to_the_bit(kind):
    """A training that goes on after the watch ends as one that was never watched."""

    def run(watch):
        torch.manual_seed(3)
        model = Net()
        optimizer = OPTIMIZERS[kind](model.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        loop = {"schedule": schedule, "clip": kind == "sgd", "micro": 2 if kind == "amsgrad" else 1}
        states = []
        if watch:
            found, _, _ = watched(lambda: train(model, optimizer, 30, **loop))
            assert len([p for p in found.capacity.batches if p.status == "ok"]) >= 1
        else:
            train(model, optimizer, 30, **loop)
        states.append(everything(model, optimizer, schedule))
        train(model, optimizer, 5, **loop)
        return [*states, everything(model, optimizer, schedule)]

    for plain, seen in zip(run(False), run(True), strict=True):
        same(plain, seen)
