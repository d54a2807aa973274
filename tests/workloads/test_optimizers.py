"""The optimizer of a workload: asked for, its own, or AdamW; its rates; fp16's loss scale; what is refused."""

import math

import pytest
import torch
from torch import nn

from pybatch import measure_noise
from pybatch.base.errors import UsageError, WorkloadError
from pybatch.capacity.step import TrainingStep
from pybatch.commands.assignments import parse_optimizer
from pybatch.optim import AdamW, Lion
from pybatch.scaling import Scaled
from pybatch.training.loop import Loop
from pybatch.training.trial import Trial
from pybatch.workloads.base import Workload
from pybatch.workloads.running.choice import OptimizerChoice
from pybatch.workloads.running.loss_scale import LEAST, SKIPPED, LossScale
from pybatch.workloads.running.optimizers import Rates, adjusted, own_group
from pybatch.workloads.running.session import Session

CPU = torch.device("cpu")


class Plain(Workload):
    name, learning_rate, reference_batch = "plain", 3e-3, 8

    def model(self):
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))

    def batch(self, n, generator, split="train"):
        x = torch.randn(n, 6, generator=generator)
        return x, (x[:, 0] > 0).long()

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])


class Own(Plain):
    """Matrices at one rate with decay, vectors at half of it without."""

    def optimizer(self, params):
        wide = [p for p in params if p.ndim > 1]
        rest = [p for p in params if p.ndim < 2]
        groups = [{"params": wide}, {"params": rest, "lr": 0.05, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9), weight_decay=0.2)


def made(workload, choice=None, **more):
    session = Session(adjusted(workload, choice or OptimizerChoice()), CPU)
    return session.optimizer(**more), session


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def test_the_workloads_own_goes_before_the_usual_and_what_is_asked_before_both():
    assert isinstance(made(Plain())[0], AdamW)
    assert rates(made(Plain())[0]) == [3e-3]
    assert isinstance(made(Own())[0], torch.optim.AdamW)
    assert rates(made(Own())[0]) == [0.1, 0.05]
    asked, _ = made(Own(), OptimizerChoice("LION", {"betas": (0.5, 0.6)}))
    assert isinstance(asked, Lion)
    assert (rates(asked), asked.defaults["betas"]) == ([0.1], (0.5, 0.6))  # at the workload's own rate
    assert rates(made(Plain(), OptimizerChoice("sgd"))[0]) == [3e-3]
    assert rates(made(Plain(), OptimizerChoice("sgd", {}, 0.7))[0]) == [0.7]
    assert rates(made(Own(), OptimizerChoice(lr=0.4))[0]) == pytest.approx([0.4, 0.2])  # groups keep their ratio


def test_the_record_says_what_was_used():
    info = Session(adjusted(Plain(), OptimizerChoice("adamw", {"betas": (0.9, 0.95)}, 3e-4), 64), CPU).info
    assert (info.optimizer, info.optimizer_options, info.learning_rate) == ("adamw", {"betas": "0.9/0.95"}, 3e-4)
    assert info.reference_batch == 64
    info = Session(Own(), CPU).info
    assert (info.optimizer, info.learning_rate, info.optimizer_options["betas"]) == ("adamw", 0.1, "0.8/0.9")
    info = Session(Plain(), CPU).info
    assert (info.optimizer, info.optimizer_options, info.learning_rate) == ("adamw", {}, 3e-3)
    assert Plain().reference_batch == 8  # the workload given stays as it is


@pytest.mark.parametrize("workload", [Plain, Own])
def test_steps_that_are_timed_have_states_and_change_nothing(workload):
    step = TrainingStep(Session(workload(), CPU))
    before = [p.detach().clone() for p in step.session.parameters]
    held = step.held_bytes
    step.load(4)
    for _ in range(3):
        step()
    assert all(torch.equal(p, q) for p, q in zip(before, step.session.parameters, strict=True))
    parameters = sum(4 * p.numel() for p in before)
    assert step.held_bytes >= held + 2 * parameters  # two moments


def test_a_rule_changes_what_it_says_in_every_group_and_no_more():
    session = Session(Own(), CPU)
    group = own_group(session.own_optimizer())
    scaled = session.optimizer_of("own:adamw", group | {"lr": 0.4, "betas": (0.8, 0.99)})
    assert rates(scaled) == pytest.approx([0.4, 0.2])
    assert [g["betas"] for g in scaled.param_groups] == [(0.8, 0.99)] * 2
    assert [g["weight_decay"] for g in scaled.param_groups] == [0.2, 0.0]


def test_rates_follow_groups_that_were_loaded():
    optimizer, _ = made(Own())
    moved = Rates(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    moved.set(1.0)
    assert rates(optimizer) == pytest.approx([1.0, 0.5])


def bad(make):
    class Bad(Plain):
        def optimizer(self, params):
            return make(params)

    return Bad()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda params: "adam", "returned str: give a torch.optim.Optimizer"),
        (lambda params: torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), "not of the model at hand"),
        (lambda params: torch.optim.LBFGS(params), "needs a closure"),
        (lambda params: torch.optim.SGD(params, lr=0.0), "give each group an lr above 0"),
    ],
)
def test_what_is_no_optimizer_to_measure_with_is_refused(make, said):
    with pytest.raises(WorkloadError, match=said):
        Session(bad(make), CPU).optimizer()


def test_what_was_asked_for_wrongly_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'adamw'"):
        made(Plain(), OptimizerChoice("adamww"))
    with pytest.raises(UsageError, match=r"'beta' is not known\. Did you mean 'betas'"):
        made(Plain(), OptimizerChoice("adamw", {"beta": 0.9}))
    with pytest.raises(UsageError, match="workload 'plain' has none"):
        Session(Plain(), CPU).own_optimizer()


def test_arguments_as_they_are_typed():
    assert parse_optimizer("adamw:lr=3e-4,betas=0.9/0.95", rated=True) == ("adamw", {"lr": 3e-4, "betas": (0.9, 0.95)})
    assert parse_optimizer("adamw:betas=(0.9,0.95)") == ("adamw", {"betas": (0.9, 0.95)})
    for text in ("adamw:betas=0.9/", "adamw:betas=0.9/x", "adamw:lr=0", "adamw:lr=True", "adamw:lr=1/2"):
        with pytest.raises(UsageError, match="adamw"):
            parse_optimizer(text, rated=True)
    with pytest.raises(UsageError, match="Leave lr out"):
        parse_optimizer("adamw:lr=3e-4")


class Faint(Plain):
    """Gradients below what fp16 can hold, unless the loss is scaled."""

    def loss(self, model, batch):
        return 1e-6 * super().loss(model, batch)


class Loud(Plain):
    """Gradients that overflow fp16 at the first scale."""

    def loss(self, model, batch):
        return (model(batch[0] * 100) ** 2).mean() * 10


@pytest.mark.parametrize("workload", [Plain, Faint])
def test_fp16_has_the_gradients_of_fp32_whatever_their_size(workload):
    found = []
    for dtype in ("fp16", "fp32"):
        session = Session(workload(), CPU, dtype)
        for _ in range(2):  # they add up
            session.backward(session.batch(64))
        found.append(torch.cat([p.grad.flatten() for p in session.parameters]))
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 5e-3


def test_an_update_whose_gradients_overflowed_is_left_out_and_the_scale_halved():
    session = Session(Loud(), CPU, "fp16")
    optimizer = session.optimizer()
    before = [p.detach().clone() for p in session.parameters]
    updated = []
    for _ in range(20):
        optimizer.zero_grad()
        session.backward(session.batch(8))
        updated.append(session.update(optimizer))
        if not any(updated):
            assert all(torch.equal(p, q) for p, q in zip(before, session.parameters, strict=True))
    assert (updated[0], updated[-1]) == (False, True)
    assert session.loss_scale <= 2.0 ** (16 - updated.index(True))
    assert all(p.isfinite().all() for p in session.parameters)
    assert math.isfinite(session.evaluate(session.batch(8)))


class Lost(Plain):
    """Gradients that no scale brings into fp16, of losses that are finite."""

    def loss(self, model, batch):
        return super().loss(model, batch) + Steep.apply(model[0].weight).sum()


class Steep(torch.autograd.Function):
    """Zero, with a gradient of infinity."""

    @staticmethod
    def forward(ctx, x):
        return x * 0

    @staticmethod
    def backward(ctx, grad):
        return grad * math.inf


def test_a_training_whose_updates_all_overflow_is_over_and_has_a_least_scale():
    session = Session(Lost(), CPU, "fp16")
    optimizer, batch = session.optimizer(), session.batch(8)
    for done in range(200):
        assert math.isfinite(session.evaluate(batch)) == (done < SKIPPED)
        optimizer.zero_grad()
        session.backward(batch)
        assert not session.update(optimizer)
    assert session.loss_scale == LEAST
    with pytest.raises(WorkloadError, match=r"200 updates in a row were left out.*6.1e-05\. Take dtype bf16"):
        session.check_finite(torch.zeros(()), "in step 3")


def test_noise_and_trials_of_a_lost_fp16_training_say_so():
    with pytest.raises(WorkloadError, match="updates in a row were left out"):
        measure_noise(Lost(), device="cpu", dtype="fp16", time_budget=3, warmup_steps=SKIPPED)
    group = {"lr": 0.1, "momentum": 0.0}
    trial = Trial("lost", "sgd", Scaled(group), 4, 0, "fp16", "cpu")
    loop = Loop(Lost(), [trial], CPU)
    loop.advance(SKIPPED)
    assert all(math.isnan(loss) for losses in loop.evaluate() for loss in losses)
    kept = LossScale(skipped=SKIPPED)
    assert kept.diverged
    assert kept.update([torch.ones(3)])
    assert not kept.diverged


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_an_update_without_gradients_or_by_sparse_ones_passes(dtype):
    session = Session(Plain(), CPU, dtype)
    assert session.update(torch.optim.SGD(session.parameters, lr=1))
    for value in (1.0, math.inf):
        sparse = torch.sparse_coo_tensor([[0, 0]], torch.tensor([1.0, value]), (4,), check_invariants=True)
        assert LossScale().update([None, sparse]) == math.isfinite(value)
