"""`step(closure)`: the first evaluation of a step is its pair of norms, against a float64 loop; later ones are none."""

import math

import pytest
import torch
from cases.noise_models import Uphill, example_gradients, expected, images, loss_of, mlp, same

import pybatch.noise
from pybatch.noise import closures
from pybatch.noise.sources import micro_batches
from pybatch.optim import AdamW

STEPS = 10
pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS = {
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4),
    "searching": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, line_search_fn="strong_wolfe"),
    "sam": lambda p: Uphill(p, lr=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "fused": lambda p: AdamW(p, lr=1e-2),
}
AGAIN = {"lbfgs", "searching", "sam"}


def train(kind, before=None, keyword=False, **options):
    """(noise, mean |G|^2, mean tr Sigma) of steps of three micro-batches, all of them run by the optimizer."""
    torch.manual_seed(3)
    model = mlp()
    optimizer = OPTIMIZERS[kind](model.parameters())
    handle = pybatch.noise.attach(model, optimizer, **({"scaler": Unscaled()} if kind == "fused" else {}), **options)
    pairs = []
    for step in range(STEPS):
        batches = [images(4) for _ in range(3)]
        pairs.append(expected([example_gradients(model, *batch)[0] for batch in batches]))

        def closure(step=step, batches=batches):
            optimizer.zero_grad()
            total = 0.0
            for i, (x, y) in enumerate(batches):
                if before is not None:
                    before(step, i)
                loss = loss_of(model(x), y) / 3
                loss.backward()
                total += float(loss.detach())
            return torch.tensor(total)

        try:
            optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        except MemoryError:
            pairs.pop()
    grad_sq, trace = (math.fsum(float(p[i].sum()) for p in pairs) / len(pairs) for i in (0, 1))
    return handle.noise, grad_sq, trace


class Unscaled:
    """A scaler at scale 1: a fused optimizer is then measured in `.grad`, where its closure puts gradients."""

    def scale(self, x):
        return x

    def get_scale(self):
        return 1.0


def right(noise, grad_sq, trace):
    close = abs(noise.trace - trace) <= 1e-4 * trace
    return close and abs(noise.grad_sq - grad_sq) <= 1e-4 * (grad_sq + trace / 12)


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_is_its_first_evaluation(kind, keyword):
    noise, grad_sq, trace = train(kind, keyword=keyword)
    assert (noise.steps, noise.skipped) == (STEPS, 0)
    assert right(noise, grad_sq, trace)
    said = [n.text for n in noise.notes if "evaluated the model again" in n.text]
    assert [text.split(" ", 1)[0] for text in said] == ([str(STEPS)] if kind in AGAIN else [])


@pytest.mark.parametrize("kind", ["lbfgs", "sam", "sgd"])
def test_training_is_not_touched(kind):
    runs = []
    for watched in (True, False):
        torch.manual_seed(3)
        model = mlp()
        optimizer = OPTIMIZERS[kind](model.parameters())
        if watched:
            pybatch.noise.attach(model, optimizer)
        for _ in range(3):
            batches = [images(4) for _ in range(2)]

            def closure(batches=batches, model=model, optimizer=optimizer):
                optimizer.zero_grad()
                total = torch.zeros(())
                for x, y in batches:
                    loss = loss_of(model(x), y) / 2
                    loss.backward()
                    total += loss.detach()
                return total

            optimizer.step(closure)
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*runs)


@pytest.mark.parametrize("at", [0, 2])
def test_a_closure_that_raises_makes_no_pair(at):
    def before(step, i):
        if (step, i) == (4, at):
            raise MemoryError

    noise, grad_sq, trace = train("lbfgs", before)
    assert noise.steps == STEPS - 1
    assert right(noise, grad_sq, trace)


def test_passes_before_the_step_are_the_pair_where_there_are_some():
    """As some write it: gradients first, then a closure for whatever the optimizer wants to know later."""
    torch.manual_seed(3)
    model = mlp()
    optimizer = Uphill(model.parameters(), lr=0.1)
    handle = pybatch.noise.attach(model, optimizer)
    pairs = []
    for _ in range(STEPS):
        batches = [images(4) for _ in range(3)]
        pairs.append(expected([example_gradients(model, *batch)[0] for batch in batches]))

        def passes(batches=batches):
            optimizer.zero_grad()
            for x, y in batches:
                (loss_of(model(x), y) / 3).backward()
            return torch.zeros(())

        passes()
        optimizer.step(passes)
    grad_sq, trace = (math.fsum(float(p[i].sum()) for p in pairs) / STEPS for i in (0, 1))
    assert handle.noise.steps == STEPS
    assert right(handle.noise, grad_sq, trace)


def test_a_detached_handle_lets_closures_alone():
    model = mlp()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pybatch.noise.attach(model, optimizer).detach()
    seen = []
    optimizer.register_step_pre_hook(lambda _, args, kwargs: seen.append(args[1]))

    def closure():
        return torch.zeros(())

    optimizer.step(closure)
    assert seen == [closure]


def test_moments_of_a_closure_count_its_examples_once():
    torch.manual_seed(3)
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    handle = pybatch.noise.attach(model, optimizer, "adam-moments", every=5)
    for _ in range(STEPS):
        x, y = images(8)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = loss_of(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert (handle.noise.steps, handle.noise.small_batch) == (2, 8)


def test_accumulation_of_a_fused_optimizer_in_its_closure():
    """opt.accumulate(n) takes the norms; the closure of step() runs once and is the step's."""
    torch.manual_seed(3)
    model = mlp()
    optimizer = AdamW(model.parameters(), lr=1e-2, noise=True)
    pairs = []
    for _ in range(STEPS):
        batches = [images(n) for n in (3, 5)]
        pairs.append(expected([example_gradients(model, *batch)[0] for batch in batches], weighted=True))

        def closure(batches=batches):
            for x, y in batches:
                loss_of(model(x), y).backward()
                optimizer.accumulate(len(x))
            return torch.zeros(())

        optimizer.step(closure)
    grad_sq, trace = (math.fsum(float(p[i].sum()) for p in pairs) / STEPS for i in (0, 1))
    assert optimizer.noise.steps == STEPS
    assert right(optimizer.noise, grad_sq, trace)


def evaluations_all_count(monkeypatch):
    """Every evaluation is added to the step's passes."""
    begin = closures.Evaluations._begin

    def open_(self, own, args, kwargs):
        changed = begin(self, own, args, kwargs)
        return None if changed is None else (args, kwargs)

    monkeypatch.setattr(closures.Evaluations, "_begin", open_)


def only_the_last(monkeypatch):
    """The pair is closed when the next step begins."""

    def close(self, own, args, kwargs):
        self._close()

    monkeypatch.setattr(closures.Evaluations, "_begin", close)


def later_ones_too(monkeypatch):
    """Later evaluations are seen by the hooks, and stay."""
    monkeypatch.setattr(closures.Evaluations, "later", property(lambda self: False, lambda self, value: None), False)
    monkeypatch.setattr(micro_batches.MicroBatchNoise, "_drop", lambda self: False)


@pytest.mark.parametrize("mutation", [evaluations_all_count, only_the_last, later_ones_too])
def test_a_wrong_implementation_is_caught(monkeypatch, mutation):
    mutation(monkeypatch)
    noise, grad_sq, trace = train("sam")
    assert not (noise.steps == STEPS and right(noise, grad_sq, trace))


def test_ddp_takes_the_first_evaluation(ranks):
    found, want = ranks[0]["ddp_closure"]
    same(found, want)
    assert found["steps"] == want["steps"]
    assert any("3 steps of the optimizer evaluated the model again" in text for text in found["notes"])
    assert not any("synchronized again" in text for text in found["notes"])


def test_fsdp_takes_the_first_evaluation(processes):
    found, want = processes[2][0]["fsdp_closure"]
    same(found, want)
    assert found["steps"] == want["steps"]
    assert any("3 steps of the optimizer evaluated the model again" in text for text in found["notes"])


def means_of(model, batches):
    return expected([example_gradients(model, *batch)[0] for batch in batches])


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("to_none", [True, False])
def test_a_closure_that_runs_the_last_micro_batch_completes_the_step(k, to_none):
    """As Lightning's automatic optimization: all but the last pass before step(closure), the last one in it."""
    make, draw = mlp, images
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    handle, truth = pybatch.noise.attach(model, optimizer), []
    for _ in range(3):
        batches = [draw(4) for _ in range(k)]
        truth.append(means_of(model, batches))
        for x, y in batches[:-1]:
            (loss_of(model(x), y) / k).backward()

        def closure(model=model, last=batches[-1]):
            loss = loss_of(model(last[0]), last[1]) / k
            loss.backward()
            return loss

        optimizer.step(closure)
        optimizer.zero_grad(set_to_none=to_none)
    noise = handle.noise
    assert (noise.steps, noise.large_batch) == (3, 4 * k)
    assert noise.grad_sq == pytest.approx(float(sum(t[0].sum() for t in truth)) / 3, rel=1e-4)
    assert noise.trace == pytest.approx(float(sum(t[1].sum() for t in truth)) / 3, rel=1e-4)
    assert not any("again over the same examples" in note.text for note in noise.notes)


class Ascent(torch.optim.SGD):
    """Sharpness-aware steps as they are often written: the gradient is there, the closure evaluates uphill of it."""

    def step(self, closure):
        params = [p for group in self.param_groups for p in group["params"]]
        moved = [0.2 * p.grad / p.grad.norm() for p in params]
        with torch.no_grad():
            for p, by in zip(params, moved, strict=True):
                p.add_(by)
        self.zero_grad()
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for p, by in zip(params, moved, strict=True):
                p.sub_(by)
        super().step()


@pytest.mark.parametrize("kind", [Ascent, torch.optim.LBFGS])
def test_a_closure_that_begins_anew_leaves_the_passes_before_it_as_the_step(kind):
    make, draw = mlp, images
    model = make()
    optimizer = kind(model.parameters(), lr=0.1)
    handle = pybatch.noise.attach(model, optimizer)
    batches = [draw(4), draw(4)]
    grad_sq, trace = means_of(model, batches)

    def passes():
        for x, y in batches:
            (loss_of(model(x), y) / 2).backward()

    def closure():
        optimizer.zero_grad()
        passes()
        return torch.tensor(1.0)

    passes()
    optimizer.step(closure)
    noise = handle.noise
    assert noise.steps == 1
    assert noise.grad_sq == pytest.approx(float(grad_sq.sum()), rel=1e-4)
    assert noise.trace == pytest.approx(float(trace.sum()), rel=1e-4)
    assert any("again over the same examples" in note.text for note in noise.notes)


def test_a_closure_that_is_never_called_loses_no_step():
    class Deaf(torch.optim.SGD):
        def step(self, closure=None):
            return super().step()

    make, draw = mlp, images
    model = make()
    optimizer = Deaf(model.parameters(), lr=0.1)
    handle = pybatch.noise.attach(model, optimizer)
    for _ in range(2):
        for x, y in (draw(4), draw(4)):
            (loss_of(model(x), y) / 2).backward()
        optimizer.step(lambda: None)
        optimizer.zero_grad()
    assert (handle.noise.steps, handle.noise.skipped) == (2, 0)
