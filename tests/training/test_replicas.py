"""Stacked replicas against the plain loop: the same losses, the same steps to target, whatever the optimizer."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from pybatch.base.errors import UsageError
from pybatch.scaling import Scaled
from pybatch.training import choosing, stack
from pybatch.training.choosing import choose, chunks, memory_for
from pybatch.training.loop import Loop
from pybatch.training.pooling import Pooling
from pybatch.training.stack import Stack
from pybatch.training.task import run_task
from pybatch.training.trial import Task, Trial
from pybatch.training.updates import StackedAdamW, StackedSGD, Views, arguments, update_for
from pybatch.workloads.base import Workload
from pybatch.workloads.running.finding import find

CPU = torch.device("cpu")


def choose_anew(*given):
    choosing._chosen.clear()
    return choose(*given)


class Points(Workload):
    """Least squares in eight dimensions; small, so that a test takes many steps."""

    name = "points"
    examples = 50

    def model(self):
        return nn.Linear(8, 1)

    def batch(self, n, generator, split="train"):
        x = torch.randn(n, 8, generator=generator)
        return x, x.sum(1, keepdim=True) + 0.1 * torch.randn(n, 1, generator=generator)

    def loss(self, model, batch):
        x, y = batch
        return nn.functional.mse_loss(model(x), y)


class Dropped(Points):
    def model(self):
        return nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.5), nn.Linear(32, 1))


class Normed(Points):
    def model(self):
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 1))


class Branching(Points):
    """Control flow that depends on the data."""

    def loss(self, model, batch):
        loss = super().loss(model, batch)
        return loss * 2 if loss > 100 else loss


class Counted(Points):
    """A forward pass that keeps state in Python: stacked and separate runs can't be the same."""

    def __init__(self):
        self.calls = 0

    def loss(self, model, batch):
        self.calls += 1
        return super().loss(model, batch) * (1 + 0.1 * self.calls)


def trials(rates=(0.01, 0.05), seeds=(0, 1), optimizer="sgd", batch=8, **changes):
    group = arguments(optimizer, changes)
    return [
        Trial("t", optimizer, Scaled(group | {"lr": lr}), batch, seed, "fp32", "cpu") for lr in rates for seed in seeds
    ]


def losses(made, steps=12):
    made.advance(steps)
    return np.array(made.evaluate())


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("sgd", {}),
        ("sgd", {"momentum": 0.9}),
        ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        ("sgd", {"momentum": 0.9, "dampening": 0.5}),
        ("sgd", {"maximize": True}),
        ("adamw", {"weight_decay": 0.1}),
        ("adamw", {"amsgrad": True}),
        ("muon", {"weight_decay": 0.1}),
    ],
)
def test_a_stack_gives_what_the_loop_gives(optimizer, options):
    some = trials(optimizer=optimizer, **options)
    apart, stacked = Loop(Points(), some, CPU), Stack(Points(), some, CPU)
    np.testing.assert_allclose(losses(stacked), losses(apart), rtol=2e-5)
    # Replicas may leave, and those that stay go on as before, states included.
    for made in (apart, stacked):
        made.keep([3, 1])
    assert [t.key for t in stacked.trials] == [some[3].key, some[1].key]
    np.testing.assert_allclose(losses(stacked), losses(apart), rtol=5e-5)


def test_clipping_is_by_each_trials_own_norm():
    some = trials(max_grad_norm=0.1)
    made, reason = choose(Points(), some, CPU)
    assert isinstance(made, Loop)
    assert reason is None
    with pytest.raises(UsageError, match="clipping"):
        Stack(Points(), some, CPU)


def test_both_ways_to_evaluate_a_stack_agree():
    made = Stack(Points(), trials(), CPU)
    made.advance(3)
    with torch.no_grad():
        np.testing.assert_allclose(made._evaluate(True), made._evaluate(False), rtol=1e-5)
    first, second = made.evaluate(), made.evaluate()
    assert made.together is not None
    np.testing.assert_allclose(first, second, rtol=1e-5)


def test_plain_optimizers_have_a_batched_form():
    assert isinstance(update_for("sgd", trials()[0].scaled.group), StackedSGD)
    assert isinstance(update_for("adamw", trials(optimizer="adamw")[0].scaled.group), StackedAdamW)
    assert isinstance(update_for("sgd", trials(maximize=True)[0].scaled.group), Views)


@pytest.mark.parametrize(("model", "target", "cap"), [("mlp", 1.0, 150), ("cnn", 2.29, 30)])
def test_digits_reach_the_target_at_the_same_steps(model, target, cap):
    some = tuple(trials((0.1, 0.4, 100.0), (0, 1), batch=16))
    task = Task(some, {"train": target, "test": target}, (0, 1), cap)
    found = {}
    for how in ("stacked", "loop"):
        out = []
        assert run_task(find("digits", model=model), task, out.append, device=CPU, how=how) is None
        assert {o.how for o in out} == {how}
        found[how] = {o.trial.key: o for o in out}
    assert set(found["stacked"]) == set(found["loop"]) == {t.key for t in some}
    for key, apart in found["loop"].items():
        stacked = found["stacked"][key]
        assert stacked.end == apart.end
        assert stacked.trajectory.steps.tolist() == apart.trajectory.steps.tolist()
        for split in ("train", "test"):
            assert stacked.trajectory.crossing(split, target) == apart.trajectory.crossing(split, target)
            np.testing.assert_allclose(stacked.trajectory.loss(split), apart.trajectory.loss(split), rtol=1e-3)
    ends = {o.trial.lr: o.end for o in found["loop"].values()}
    assert ends[100.0] == "diverged"
    assert model == "cnn" or "met" in ends.values()  # a CNN needs more steps than a test has time for


def test_a_trial_does_not_depend_on_its_company():
    alone = losses(Stack(Points(), trials()[2:3], CPU))
    np.testing.assert_allclose(losses(Stack(Points(), trials(), CPU))[:, 2], alone[:, 0], rtol=2e-5)


def test_seeds_have_models_and_batches_of_their_own_and_rates_share_them():
    made = Loop(Points(), trials((0.01, 0.02, 0.03)), CPU)
    weights = [session.model.weight for session in made.sessions]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])
    drawn = made.draw()
    assert set(drawn) == {0, 1}
    assert not torch.equal(drawn[0][0], drawn[1][0])


def test_a_stack_makes_the_model_of_a_seed_once_and_trains_copies():
    made = []

    class Told(Points):
        def model(self):
            made.append(super().model())
            return made[-1]

    stacked = Stack(Told(), trials((0.01, 0.02, 0.03)), CPU)
    first = stacked.params[stacked.trained[0]].detach().clone()
    assert len(made) == 3  # the last is for the fixed batches
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    stacked.advance(2)
    assert len(stacked.params[stacked.trained[0]].detach().flatten(1).unique(dim=0)) == 6
    assert torch.equal(made[0].weight, first[0])


@pytest.mark.parametrize(
    ("workload", "why"),
    [(Dropped(), "vmap"), (Branching(), "vmap"), (Counted(), "differ")],
    ids=["dropout", "control flow", "state"],
)
def test_what_vmap_cannot_do_is_trained_one_by_one(workload, why):
    made, note = choose(workload, trials(), CPU)
    assert isinstance(made, Loop)
    assert why in note
    assert made.done == 0  # measuring leaves no trace


def test_batch_norm_is_the_same_either_way_or_not_stacked():
    made, note = choose(Normed(), trials(), CPU)
    if isinstance(made, Loop):
        assert note is None or "not stacked" in note
        return
    np.testing.assert_allclose(losses(made), losses(Loop(Normed(), trials(), CPU)), rtol=1e-4)


def test_the_faster_form_is_taken(monkeypatch):
    asked = []

    def timed(slow):
        def _timed(made, index):
            asked.append(made)
            losses = ([1.0] * len(made.trials), [1.0] * len(made.trials))
            return losses, [torch.ones(len(index))], 1.0 if isinstance(made, slow) else 0.01

        return _timed

    monkeypatch.setattr(choosing, "_timed", timed(Loop))
    assert isinstance(choose(Points(), trials(), CPU)[0], Stack)
    monkeypatch.setattr(choosing, "_timed", timed(Stack))
    more = [dataclasses.replace(trial, seed=trial.seed + 7) for trial in trials()]
    assert isinstance(choose(Points(), more, CPU)[0], Stack)
    assert len(asked) == 2, "what differs in seeds alone is not compared again"
    larger = [dataclasses.replace(trial, batch=2 * trial.batch) for trial in more]
    assert isinstance(choose(Points(), larger, CPU)[0], Loop)
    assert isinstance(choose(Points(), trials(momentum=0.9), CPU)[0], Loop)
    assert isinstance(choose(Points(), trials() * 2, CPU)[0], Loop)


def test_memory_that_runs_out_for_a_stack_chosen_before_is_told_as_such(monkeypatch):
    monkeypatch.setattr(choosing, "_compared", lambda *given: ((None, None), None))
    assert isinstance(choose(Points(), trials(), CPU)[0], Stack)

    def none_left(*given):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(choosing, "Stack", none_left)
    with pytest.raises(choosing.StackTooLargeError):
        choose(Points(), trials(), CPU)


def test_a_stack_refuses_trials_that_differ_in_more_than_their_rates():
    with pytest.raises(UsageError, match="rates only"):
        Stack(Points(), trials() + trials(momentum=0.9), CPU)


def test_dropout_is_drawn_by_seed_and_step():
    some = trials()
    together = losses(Loop(Dropped(), some, CPU))
    alone = losses(Loop(Dropped(), some[1:2], CPU))
    np.testing.assert_array_equal(together[:, 1], alone[:, 0])


def test_warm_up_reaches_the_update():
    warm = [dataclasses.replace(t, scaled=Scaled(t.scaled.group, 50, 0.0)) for t in trials()]
    for kind in (Loop, Stack):
        assert losses(kind(Points(), warm, CPU), 3)[0].mean() > losses(kind(Points(), trials(), CPU), 3)[0].mean()
    np.testing.assert_allclose(losses(Loop(Points(), warm, CPU)), losses(Stack(Points(), warm, CPU)), rtol=2e-5)


def test_adascale_takes_the_mean_gradient_and_a_gain_within_its_bounds():
    """Without a step between, its gradient is that of the whole batch."""
    [one] = trials((0.05,), (0,), batch=32)
    scaled = dataclasses.replace(one, scaled=dataclasses.replace(one.scaled, gain_batch=8))
    made = Loop(Points(), [scaled], CPU)
    session, batch = made.sessions[0], made.draw()[0]
    factor = made.gains[0].backward(session, batch)
    mine = session.model.weight.grad.clone()
    session.model.zero_grad()
    session.backward(batch)
    torch.testing.assert_close(mine, session.model.weight.grad)
    assert 1 <= factor <= 4
    plain = losses(Loop(Points(), [one], CPU), 5)
    assert losses(Loop(Points(), [scaled], CPU), 5)[0][0] < plain[0][0]  # its rate is higher


def test_adascale_estimates_the_noise_of_the_gradient():
    """At fixed parameters: sigma^2 and mu^2 of base batches, from a known regression (B_simple = d + 1)."""

    class Isotropic(Points):
        def model(self):
            made = nn.Linear(63, 1, bias=False)
            nn.init.zeros_(made.weight)
            return made

        def batch(self, n, generator, split="train"):
            x = torch.randn(n, 63, generator=generator)
            return x, 0.5 * x.sum(1, keepdim=True)

        def loss(self, model, batch):
            return super().loss(model, batch) / 2

    [one] = trials((0.05,), (0,), batch=64)
    made = Loop(Isotropic(), [dataclasses.replace(one, scaled=Scaled(one.scaled.group, gain_batch=8))], CPU)
    for _ in range(400):
        made.optimizers[0].zero_grad()
        made.gains[0].backward(made.sessions[0], made.draw()[0])
    state = made.gains[0]
    assert state.trace / state.weight == pytest.approx(1008 / 8, rel=0.15)
    assert state.grad_sq / state.weight == pytest.approx(15.75, rel=0.15)


def test_trials_that_do_not_fit_together_are_run_in_groups_middle_rates_first():
    some = trials((0.1, 0.2, 0.4, 0.8, 1.6))
    assert len(chunks(some, 100, memory_for(CPU))) == 1
    groups = chunks(some, 100, 4 * 100 * 4)
    assert [len(g) for g in groups] == [4, 4, 2]
    assert groups[0][0].lr == 0.4
    assert {t.key for g in groups for t in g} == {t.key for t in some}


def test_loading_kernels_is_no_part_of_an_evaluations_time(monkeypatch):
    """On a GPU the first evaluation of all replicas at once takes longest, and one by one would be taken for good."""
    made = Stack(Points(), trials(), CPU)
    now, calls, losses_of = [0.0], [], made._evaluate

    def evaluate(together):
        now[0] += 9.0 if not calls else 1.0 if together else 5.0
        calls.append(together)
        return losses_of(together)

    monkeypatch.setattr(made, "_evaluate", evaluate)
    monkeypatch.setattr(stack.time, "perf_counter", lambda: now[0])
    made.device = torch.device("cuda")
    made.evaluate()
    assert made.together is True
    assert calls == [True, False, True, False]


def test_a_gpu_is_given_as_many_trials_as_its_memory_holds(monkeypatch):
    """A 10.9 M parameter model: 1 GiB would part 36 trials into groups of six on a device of 139 GiB."""
    gpu, freed = torch.device("cuda", 1), []
    monkeypatch.setattr(choosing, "release", freed.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (120 * 2**30, 139 * 2**30))
    some = trials(tuple(0.01 * 2**i for i in range(18)))
    assert len(some) == 36
    assert len(chunks(some, 4 * 10_900_000, memory_for(gpu))) == 1
    assert freed == [gpu]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 139 * 2**30))
    assert len(chunks(some, 4 * 10_900_000, memory_for(gpu))) == 36  # what others use is not taken


def test_groups_change_no_result(monkeypatch):
    task = Task(tuple(trials((0.02, 0.05, 0.1), batch=16)), {"train": 0.5}, (0, 1), cap=200)
    steps = []
    for memory in (2**30, 1):
        monkeypatch.setattr(choosing, "MEMORY", memory)
        out, study = [], task.study()
        run_task(Points(), task, out.append, device=CPU, how="loop")
        for o in out:
            study.take(o)
        crossings = [study.steps("train", t.lr, t.seed) for t in task.trials]
        steps.append([c.steps if c else None for c in crossings])
    assert steps[0] == steps[1]
    assert any(steps[0])


@pytest.mark.parametrize(
    "pool",
    [
        torch.nn.MaxPool2d(2),
        torch.nn.MaxPool2d((4, 2)),
        torch.nn.MaxPool2d(3, stride=2, padding=1),
        torch.nn.MaxPool2d(2, stride=1),
        torch.nn.MaxPool2d(2, dilation=2),
        torch.nn.MaxPool2d(3, ceil_mode=True),
        lambda x: torch.max_pool2d(x, [2, 2]),
    ],
)
def test_pooling_without_a_gradient_gives_the_same_maxima(pool, monkeypatch):
    images = torch.randn(3, 2, 8, 12, generator=torch.Generator().manual_seed(0))
    images[0, 0, 0, 0] = torch.nan
    with torch.no_grad():
        expected = pool(images)
        with Pooling():
            alone = pool(images)
            stacked = torch.vmap(pool)(images[:, None])[:, 0]
    for found in (alone, stacked):
        assert torch.equal(torch.nan_to_num(found, 9.0), torch.nan_to_num(expected, 9.0))
    images.requires_grad_()
    with Pooling():
        assert "MaxPool2D" in type(pool(images).grad_fn).__name__  # with one it is torch's


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_rates_are_uploaded_once_for_all_parameters(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    made: list[object] = []
    monkeypatch.setattr(torch, "tensor", lambda *a, real=torch.tensor, **k: made.append(a) or real(*a, **k))
    counts = []
    for parameters in (1, 5):
        params = [torch.ones(3, 4, requires_grad=True) for _ in range(parameters)]
        for p in params:
            p.grad = torch.ones_like(p)
        update = update_for(name, arguments(name, {}))
        made.clear()
        with torch.no_grad():
            update.step(params, [0.1, 0.2, 0.3])
        counts.append(len(made))
    assert counts[0] == counts[1] <= 2


class Moody(Points):
    """After some steps its loss is what vmap cannot run: a branch on the data."""

    def __init__(self):
        self._seen = 0

    def loss(self, model, batch):
        self._seen += model.training
        loss = super().loss(model, batch)
        return loss if self._seen < 60 or loss.item() > -1 else -loss


def test_a_stack_that_fails_on_its_way_is_trained_on_one_by_one(monkeypatch):
    rows = tuple(trials(rates=(0.01, 0.05, 1e9), seeds=(0,)))
    task = Task(rows, {"train": 0.02}, (0,), 400)
    monkeypatch.setattr("pybatch.training.task.choose", lambda w, t, d, how: (Stack(w, t, d), None))
    broken, whole = [], []
    reason = run_task(Moody(), task, broken.append, device=CPU)
    assert "not stacked to the end: at step" in reason
    run_task(Points(), task, whole.append, device=CPU, how="loop")
    assert sorted(o.trial.lr for o in broken) == [0.01, 0.05, 1e9]  # each once
    steps = [{o.trial.lr: (o.end, o.steps) for o in found} for found in (broken, whole)]
    assert steps[0] == steps[1]
    with pytest.raises(RuntimeError, match="vmap"):
        run_task(Moody(), task, broken.append, device=CPU, how="stacked")


def test_a_stack_too_large_for_memory_is_halved(monkeypatch):
    taken = []

    class Large(Stack):
        def __init__(self, workload, trials, device):
            taken.append(len(trials))
            super().__init__(workload, trials, device)

        def advance(self, steps):
            if len(self.trials) > 2:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
            super().advance(steps)

    monkeypatch.setattr(choosing, "Stack", Large)
    task = Task(tuple(trials(rates=(0.01, 0.03, 0.05, 0.1), seeds=(0, 1))), {"train": 0.02}, (0, 1), 40)
    found, whole = [], []
    assert run_task(Points(), task, found.append, device=CPU) is None
    tried = [count for before, count in zip([0, *taken], taken, strict=False) if count != before]
    assert tried == [8, 4, 2], "a size that did not fit is not tried again"
    run_task(Points(), task, whole.append, device=CPU, how="loop")
    assert sorted(o.trial.key for o in found) == sorted(trial.key for trial in task.trials)
    best = [min((o.steps, o.trial.lr, o.trial.seed) for o in some if o.end == "met") for some in (found, whole)]
    assert best[0] == best[1]


def test_memory_that_runs_out_on_the_way_halves_what_is_left(monkeypatch):
    """Activations may grow when others take memory, long after a stack was chosen."""
    sizes = []

    class Swelling(Stack):
        def advance(self, steps):
            sizes.append(len(self.trials))
            if len(self.trials) > 2 and self.done >= 8:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            super().advance(steps)

    task = Task(tuple(trials(rates=(0.01, 0.03, 0.05, 1e9), seeds=(0, 1))), {"train": 0.02}, (0, 1), 40)
    found, whole = [], []
    run_task(Points(), task, whole.append, device=CPU, how="loop")
    monkeypatch.setattr("pybatch.training.task.choose", lambda w, t, d, how: (Swelling(w, t, d), None))
    assert run_task(Points(), task, found.append, device=CPU) is None
    assert (sizes[0], sizes[-1]) == (8, 2)
    assert sorted(o.trial.key for o in found) == sorted(trial.key for trial in task.trials)  # each once
    ends = [{o.trial.key: o.end for o in some if o.trial.lr in (0.05, 1e9)} for some in (found, whole)]
    assert ends[0] == ends[1]
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run_task(Points(), task, found.append, device=CPU, how="stacked")


@pytest.mark.isa
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_in_bf16_rounding_is_no_fault_and_a_fault_is_still_seen(monkeypatch, optimizer):
    """Gradients in bf16 differ by a tenth, and steps of Adam follow their signs; a fault below that shows in fp32."""
    some = [dataclasses.replace(t, dtype="bf16") for t in trials((0.01, 0.1), (0, 1), optimizer=optimizer, batch=8)]
    scenes = find("scenes")
    scenes.evaluation_examples = 2  # what is compared are gradients, and these take most of the time
    monkeypatch.setattr(
        choosing, "_timed", lambda made, index, real=choosing._timed: (*real(made, index)[:2], 1.0)
    )  # of equal speed: a stack is taken
    made, note = choose_anew(scenes, some, CPU)
    assert (type(made), note) == (Stack, None)

    class Off(Stack):
        def _gradients(self, batch, folded):
            return tuple(g + 2e-3 * g.norm() for g in super()._gradients(batch, folded))

    monkeypatch.setattr(choosing, "Stack", Off)
    made, note = choose_anew(Points(), [dataclasses.replace(t, dtype="bf16") for t in trials((1e-4, 2e-4))], CPU)
    assert (type(made), note) == (Loop, "not stacked: gradients of stacked and separate replicas differ")


def test_a_fault_too_small_for_early_losses_shows_in_gradients(monkeypatch):
    class Off(Stack):
        def _gradients(self, batch, folded):
            grads = super()._gradients(batch, folded)
            return tuple(g + 2e-3 * g.norm() for g in grads)

    monkeypatch.setattr(choosing, "Stack", Off)
    made, note = choose(Points(), trials((1e-4, 2e-4)), CPU)
    assert isinstance(made, Loop)
    assert note == "not stacked: gradients of stacked and separate replicas differ"


def test_parameters_with_one_gradient_tensor_are_updated_as_by_the_optimizer():
    class Summed(nn.Module):
        """Its parameters are added to each other: autograd gives both the same tensor."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.arange(3.0))

        def forward(self, x):
            return x * (self.a + self.b)

    class Sums(Points):
        def model(self):
            return Summed()

        def loss(self, model, batch):
            return model(batch[0][:, :3]).square().mean()

    group = arguments("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1})
    some = [Trial("t", "sgd", Scaled(group | {"lr": lr}), 8, 0, "fp32", "cpu") for lr in (0.01, 0.1)]
    apart, together = Loop(Sums(), some, CPU), Stack(Sums(), some, CPU)
    for made in (apart, together):
        made.advance(3)
    for key, stacked in together.params.items():
        name = key.removeprefix("model.")
        for mine, session in zip(stacked, apart.sessions, strict=True):
            torch.testing.assert_close(mine, session.model.get_parameter(name), rtol=1e-5, atol=1e-6)


def test_a_stack_trains_in_the_form_whose_losses_were_compared(monkeypatch):
    def timed(replicas, index):
        if isinstance(replicas, Stack):
            replicas.folded, replicas.together = True, False
        return ([0.0] * len(replicas.trials),) * 2, [torch.ones(len(index))], 0.0

    monkeypatch.setattr(choosing, "_timed", timed)
    made, _ = choose(Points(), trials(), CPU)
    assert (made.folded, made.together) == (True, False)


class Steep(Points):
    """At a high rate a step leads hundreds of waves on, and what is off by a rounding grows ten thousandfold."""

    def model(self):
        return nn.Sequential(nn.Linear(8, 1))

    def loss(self, model, batch):
        x, _ = batch
        return 1 + 1e-3 * (100 * model(x)).sin().mean()


def test_rounding_that_grows_at_a_high_rate_refuses_no_stack(monkeypatch):
    """Begun one rounding away the loop comes as far from itself; a fault of the same size is still seen elsewhere."""
    some = trials((1e-3, 1e3), (0, 1))
    real = choosing._timed

    def taken(made, index):
        losses, gradients, _ = real(made, index)
        return losses, gradients, 0.0 if isinstance(made, Stack) else 1.0

    def off(rate, by):
        """A stack whose losses are off at one rate."""

        def timed(made, index):
            losses, gradients, seconds = taken(made, index)
            if isinstance(made, Stack):
                where = [by if t.lr == rate else 0.0 for t in made.trials]
                losses = tuple([x + d for x, d in zip(own, where, strict=True)] for own in losses)
            return losses, gradients, seconds

        monkeypatch.setattr(choosing, "_timed", timed)
        return choose_anew(Steep(), some, CPU)

    monkeypatch.setattr(choosing, "AGREE", 1e-6)
    assert isinstance(off(1e3, 1e-5)[0], Stack)
    assert "differ" in off(1e-3, 1e-5)[1]  # at a rate at which nothing grows it is a fault
    assert "differ" in off(1e3, 0.1)[1]  # and so is what is more than it grows
