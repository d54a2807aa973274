"""`attach` on one process: every source against a float64 loop over examples and against closed forms."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from cases.noise_models import MODELS, example_gradients, expected, images, loss_of, mlp
from torch import nn

import pybatch.noise
from pybatch.base.errors import UsageError
from pybatch.noise.norms import SMALL, square, squares
from pybatch.noise.sources import micro_batches as source_module
from pybatch.optim import AdamW


@pytest.fixture(autouse=True)
def seeded(one_thread):
    torch.manual_seed(0)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (4096,), (SMALL + 1,), (300, 301)])
def test_squares(dtype, shape):
    tensor = torch.randn(shape, dtype=dtype)
    truth = float(tensor.double().square().sum())
    for found in (square(tensor), squares([tensor])[0], squares([torch.ones(7), tensor])[1]):
        assert found.dtype == torch.float64
        assert float(found) == pytest.approx(truth, rel=3e-6, abs=0)


def micro_batches(draw, sizes):
    return [draw(n) for n in sizes]


def accumulate(model, batches, accumulation):
    """Backward passes of one step, as a user writes them."""
    total = sum(len(y) for _, y in batches)
    for x, y in batches:
        factor = {"mean": 1 / len(batches), "sum": 1.0, "weighted": len(y) / total}[accumulation]
        (loss_of(model(x), y) * factor).backward()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("accumulation", ["mean", "sum", "weighted"])
@pytest.mark.parametrize("layers", ["layers", "total", "layers on the device"])
def test_micro_batches_are_the_loop_over_examples(monkeypatch, name, accumulation, layers):
    """Every model, unequal micro-batches, total and each parameter; clipping afterwards changes nothing."""
    if layers == "layers on the device":  # as of a larger model, or one on a GPU
        monkeypatch.setattr(source_module, "SMALL", 0)
    make, draw = MODELS[name]
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = pybatch.noise.attach(model, optimizer, layers=layers != "total", accumulation=accumulation)
    truth = []
    for sizes in ((3, 5, 2), (4, 4)):
        batches = micro_batches(draw, sizes)
        found = [example_gradients(model, *batch) for batch in batches]
        truth.append(expected([f[0] for f in found], accumulation == "weighted"))
        accumulate(model, batches, accumulation)
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
    noise = handle.noise
    widths = found[0][1]
    grad_sq, trace = (sum(step[i] for step in truth) / 2 for i in (0, 1))
    assert (noise.source, noise.steps, noise.skipped) == ("micro-batches", 2, 0)
    assert noise.grad_sq == pytest.approx(float(grad_sq.sum()), rel=1e-4, abs=1e-6)
    assert noise.trace == pytest.approx(float(trace.sum()), rel=1e-4)
    named = [n for n, _ in model.named_parameters()] if layers != "total" else []
    assert [layer.name for layer in noise.layers] == named
    for layer, g, t in zip(noise.layers, grad_sq.split(widths), trace.split(widths), strict=bool(named)):
        assert layer.grad_sq == pytest.approx(float(g.sum()), rel=1e-3, abs=1e-6)
        assert layer.trace == pytest.approx(float(t.sum()), rel=1e-3, abs=1e-6)
    if accumulation == "weighted":
        assert noise.large_batch == 9
    assert any("dimension 0" in n.text for n in noise.notes)


@pytest.mark.parametrize("how", ["plain", "zeros", "closure", "cleared"])
def test_one_step_in_every_so_many_is_measured_as_it_would_be_alone(how):
    """Steps between add nothing, whatever they leave behind."""
    make, draw = MODELS["mlp"]
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = pybatch.noise.attach(model, optimizer, "micro-batches", every=3)
    truth = []
    for place in range(7):
        batches = micro_batches(draw, (3, 5) if place % 3 == 0 else (4, 2, 6))
        if place % 3 == 0:
            truth.append(expected([example_gradients(model, *batch)[0] for batch in batches], False))
        elif how == "cleared":  # as a script does after a loss that is not finite
            accumulate(model, batches, "mean")
            optimizer.zero_grad()

        def evaluate(batches=batches, measured=place % 3 == 0):
            assert all(bool(p._backward_hooks) == measured for p in model.parameters())  # they cost in every pass
            accumulate(model, batches, "mean")
            return torch.zeros(())

        if how == "closure":
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
        optimizer.zero_grad(set_to_none=how != "zeros")
    handle.detach()
    assert not any(p._backward_hooks for p in model.parameters())
    noise = handle.noise
    grad_sq, trace = (float(sum(step[i].sum() for step in truth)) / 3 for i in (0, 1))
    assert (noise.steps, noise.skipped) == (3, 0)
    assert noise.grad_sq == pytest.approx(grad_sq, rel=1e-4, abs=1e-6)
    assert noise.trace == pytest.approx(trace, rel=1e-4)
    assert "one step in 3 is measured" in [note.text for note in noise.notes]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_kept_as_zeros_and_large_gradients(monkeypatch, set_to_none):
    """Either way of clearing gradients, and norms taken one gradient at a time."""
    from pybatch.noise.sources import micro_batches as source

    found = []
    for held in (source.HELD_BYTES, 0):
        monkeypatch.setattr(source, "HELD_BYTES", held)
        torch.manual_seed(1)
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = pybatch.noise.attach(model, optimizer)
        for _ in range(3):
            accumulate(model, micro_batches(images, (4, 4, 4)), "mean")
            optimizer.step()
            optimizer.zero_grad(set_to_none)
        found.append(handle.noise)
    assert found[0].steps == 3
    assert found[1].trace == pytest.approx(found[0].trace, rel=1e-6)
    assert found[1].grad_sq == pytest.approx(found[0].grad_sq, rel=1e-4)


def regression(lr=0.0, kind=torch.optim.SGD, **options):
    """d = 63 without label noise, half a unit off: B_simple = 64 at the start."""
    model = nn.Linear(63, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model, kind(model.parameters(), lr=lr, **options)


def regression_loss(model, n):
    x = torch.randn(n, 63)
    return 0.5 * (model(x)[:, 0] - 0.5 * x.sum(1)).square().mean()


@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("rows", [50, 20_000])  # of a small model, whose norms are numbers; and a table beyond that
def test_sparse_gradients_are_measured_as_the_same_dense_ones(rows, layers):
    """Rows that occur twice in a micro-batch, and in both of a step, are added before they are squared."""
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(rows, 8, sparse=sparse), nn.Flatten(), nn.Linear(24, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = pybatch.noise.attach(model, optimizer, source="micro-batches", layers=layers)
        for _ in range(6):
            optimizer.zero_grad()
            for _ in range(2):
                x, y = torch.randint(20, (4, 3)), torch.randint(2, (4,))
                nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        found.append(handle.noise)
    dense, own = found
    assert own.steps == dense.steps == 6
    assert own.trace == pytest.approx(dense.trace, rel=1e-5)
    assert own.grad_sq == pytest.approx(dense.grad_sq, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_a_sparse_gradient_without_rows_is_zero(first):
    """Micro-batches of padding alone, before and after one that is not; layer by layer, in either order of layers."""

    class Model(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            made = {"table": nn.Embedding(50, 8, padding_idx=0, sparse=sparse), "out": nn.Linear(8, 2)}
            for name in made if first else reversed(made):
                self.add_module(name, made[name])

        def forward(self, x):
            return self.out(self.table(x).sum(1))

    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = Model(sparse)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = pybatch.noise.attach(model, optimizer, source="micro-batches", layers=True)
        for step in range(6):
            optimizer.zero_grad()
            for part in range(3):
                x = torch.randint(1, 20, (4, 3)) * (part != step % 3)
                nn.functional.cross_entropy(model(x), torch.randint(2, (4,))).backward()
            optimizer.step()
        found.append(handle.noise)
    dense, own = found
    assert own.trace == pytest.approx(dense.trace, rel=1e-5)
    for layer, same in zip(own.layers, dense.layers, strict=True):
        assert layer.name == same.name
        assert layer.trace == pytest.approx(same.trace, rel=1e-5)
        assert layer.grad_sq == pytest.approx(same.grad_sq, rel=1e-4, abs=1e-6)


def test_sparse_gradients_are_preconditioned_as_the_same_dense_ones():
    """By SparseAdam, whose state has the shape of the table and whose gradients have few rows."""
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Embedding(50, 8, sparse=sparse)
        kind = torch.optim.SparseAdam if sparse else torch.optim.Adam
        optimizer = kind(model.parameters(), lr=1e-12)
        handle = pybatch.noise.attach(model, optimizer, source="micro-batches", preconditioned=True)
        for _ in range(6):
            optimizer.zero_grad()
            for _ in range(2):
                model(torch.arange(50)[torch.randperm(50)]).square().mean().mul(torch.rand(())).backward()
            optimizer.step()
        found.append(handle.noise.preconditioned)
    dense, own = found
    assert own.trace == pytest.approx(dense.trace, rel=1e-4)
    assert own.grad_sq == pytest.approx(dense.grad_sq, rel=1e-4)


def test_closed_form_and_state():
    """The interval holds d + 1 = 64, and a handle with another's state goes on as that one."""
    model, optimizer = regression()
    handle = pybatch.noise.attach(model, optimizer, examples=8)
    before = model.weight.clone()
    for step in range(400):
        if step == 150:
            saved = handle.state_dict()
            handle.detach()
            handle = pybatch.noise.attach(model, optimizer, examples=8)
            handle.load_state_dict(saved)
        for _ in range(4):
            (regression_loss(model, 8) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    noise = handle.whole
    assert (noise.status, noise.steps, noise.small_batch, noise.large_batch) == ("resolved", 400, 8, 32)
    assert noise.low <= 64 <= noise.high
    assert noise.high / noise.low < 1.6
    newest = handle.noise
    assert (newest.status, newest.first_step, newest.last_step, newest.steps) == ("resolved", 301, 400, 100)
    assert newest.low <= 64 <= newest.high
    assert sum(point.steps for point in newest.trajectory) == 400
    assert (model.weight == before).all()
    with pytest.raises(UsageError, match=r"source 'ddp' for a handle of source 'micro-batches'"):
        handle.load_state_dict({**saved, "source": "ddp"})
    with pytest.raises(UsageError, match=r"lacks \['single', 'statistics'\]"):
        handle.load_state_dict({"source": "micro-batches"})
    wider = pybatch.noise.attach(*regression(), layers=True)
    with pytest.raises(UsageError, match="has shape"):
        wider.load_state_dict(saved)


def test_detached_handle_sees_nothing_and_stays_readable():
    model, optimizer = regression()
    handle = pybatch.noise.attach(model, optimizer)
    for _ in range(2):
        regression_loss(model, 4).backward()
    optimizer.step()
    before = handle.noise
    handle.detach()
    for _ in range(2):
        regression_loss(model, 4).backward()
    optimizer.step()
    assert handle.noise == before
    assert before.steps == 1


def step(optimizer, losses):
    for loss in losses:
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_bad_steps_have_a_status_and_a_reason():
    """One micro-batch, equal ones, zero gradients, too few, not finite: never a number."""
    model, optimizer = regression()
    cases = {
        "no pair of norms": lambda: [regression_loss(model, 8)],
        "too few": lambda: (regression_loss(model, 8) / 2 for _ in range(2)),
        "every gradient was zero": lambda: (0 * regression_loss(model, 8) for _ in range(2)),
        "equal within rounding": lambda: equal(model),
    }
    for says, losses in cases.items():
        handle = pybatch.noise.attach(model, optimizer, "micro-batches")
        for _ in range(3 if says == "too few" else 20):
            step(optimizer, losses())
        noise = handle.noise
        handle.detach()
        assert noise.status == "unresolved"
        assert (noise.b_simple, noise.low, noise.high) == (None, None, None)
        assert says in noise.notes[0].text


def equal(model):
    x = torch.randn(8, 63)
    return ((model(x) - 1).square().mean() / 3 for _ in range(3))


def test_overflow_is_skipped_and_counted():
    """A gradient that is not finite leaves the rest of the estimate as it was."""
    model, optimizer = regression()
    handle = pybatch.noise.attach(model, optimizer)
    for i in range(30):
        factors = (0.5, math.inf if i % 10 == 4 else 0.5)
        step(optimizer, (regression_loss(model, 8) * factor for factor in factors))
        nn.init.zeros_(model.weight)  # infinity times a rate of 0 is not a number
    noise = handle.noise
    assert (noise.steps, noise.skipped, noise.status) == (27, 3, "resolved")


def test_scaler_unscales_and_skips_count():
    """Norms in the gradient's own units, whatever the scale was; steps the scaler left out are counted."""
    found = []
    for scaled in (False, True):
        torch.manual_seed(5)
        model, optimizer = regression()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3, enabled=scaled)
        handle = pybatch.noise.attach(model, optimizer, scaler=scaler if scaled else None)
        for i in range(12):
            for _ in range(2):
                loss = scaler.scale(regression_loss(model, 8) / 2)
                (loss * math.inf if scaled and i == 7 else loss).backward()
            if not (i == 7 and not scaled):
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
        found.append(handle.noise)
    plain, unscaled = found
    assert unscaled.steps == plain.steps == 11
    assert (plain.skipped, unscaled.skipped) == (0, 1)
    assert unscaled.grad_sq == pytest.approx(plain.grad_sq, rel=1e-5)
    assert unscaled.trace == pytest.approx(plain.trace, rel=1e-5)


def test_tokens_are_counted_by_the_user():
    """A loss that is a mean over tokens, ragged micro-batches: the estimate is per token, and is the loop's."""
    make, draw = MODELS["mlp"]
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = pybatch.noise.attach(model, optimizer, examples="count", accumulation="weighted", unit="tokens")
    batches = micro_batches(draw, (7, 2, 4))
    truth = expected([example_gradients(model, *b)[0] for b in batches], weighted=True)
    for x, y in batches:
        loss = loss_of(model(x), y) * len(y) / 13
        handle.count(len(y))
        loss.backward()
    optimizer.step()
    noise = handle.noise
    assert (noise.unit, noise.large_batch) == ("tokens", 13)
    assert noise.grad_sq == pytest.approx(float(truth[0].sum()), rel=1e-4)
    assert noise.trace == pytest.approx(float(truth[1].sum()), rel=1e-4)
    assert not any("dimension 0" in n.text for n in noise.notes)
    with pytest.raises(UsageError, match="not called before backward"):
        loss_of(model(batches[0][0]), batches[0][1]).backward()
    with pytest.raises(UsageError, match=r"count\(0\)"):
        handle.count(0)


def test_dropout_is_named_and_evaluation_is_not_counted():
    model = nn.Sequential(nn.Linear(36, 4), nn.Dropout(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = pybatch.noise.attach(model, optimizer)
    x, y = torch.randn(4, 36), torch.randint(0, 4, (4,))
    for _ in range(2):
        loss_of(model(x), y).backward()
        with torch.no_grad():
            model(torch.randn(100, 36))
    optimizer.step()
    assert handle.noise.large_batch == 8
    assert any("dropout was active" in n.text for n in handle.noise.notes)


def test_preconditioned_is_the_weighted_loop():
    """tr(P Sigma) and G^T P G with the P of Adam's state before the step."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-3)
    handle = pybatch.noise.attach(model, optimizer, preconditioned=True)
    truth = []
    for i in range(4):
        batches = micro_batches(images, (4, 4))
        if i:
            weight = torch.cat(
                [
                    1 / ((optimizer.state[p]["exp_avg_sq"].double() / (1 - 0.999**i)).sqrt() + 1e-3).flatten()
                    for p in model.parameters()
                ]
            )
            grads = [example_gradients(model, *b)[0] for b in batches]
            truth.append([float((weight * part).sum()) for part in expected(grads)])
        accumulate(model, batches, "mean")
        optimizer.step()
        optimizer.zero_grad()
    found = handle.noise.preconditioned
    assert found.steps == 3  # the first step has no P yet
    assert [found.grad_sq, found.trace] == pytest.approx(np.mean(truth, axis=0), rel=1e-3, abs=1e-6)
    assert any("experimental" in n.text for n in handle.noise.notes)
    with pytest.raises(UsageError, match="keeps no second moment"):
        pybatch.noise.attach(model, torch.optim.SGD(model.parameters()), preconditioned=True)


def test_a_fused_optimizer_made_without_noise_is_measured_as_any_other():
    found = []
    for kind in (torch.optim.AdamW, AdamW):
        torch.manual_seed(0)
        model, optimizer = regression(kind=kind)
        handle = pybatch.noise.attach(model, optimizer)
        for _ in range(12):
            for _ in range(2):
                (regression_loss(model, 8) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(handle.noise)
    assert (found[1].source, found[1].steps) == ("micro-batches", 12)
    assert found[1].trace == pytest.approx(found[0].trace, rel=1e-4)


def test_a_fused_optimizer_measures_itself():
    model, optimizer = regression(kind=AdamW, noise=True)
    handle = pybatch.noise.attach(model, optimizer)
    for _ in range(12):
        for _ in range(2):
            regression_loss(model, 8).backward()
            optimizer.accumulate(8)
        optimizer.step()
    assert handle.noise == optimizer.noise
    assert handle.noise.steps == 12
    assert handle.state_dict() == {}
    counted = pybatch.noise.attach(model, optimizer, unit="tokens").noise
    assert counted == dataclasses.replace(optimizer.noise, unit="tokens")
    assert counted.in_examples(4.0).large_batch == 4.0
    with pytest.raises(UsageError, match=r"examples, preconditioned can't be given with a fused optimizer"):
        pybatch.noise.attach(model, optimizer, examples="count", preconditioned=True)


def test_a_backward_pass_that_raised_is_left_behind():
    """As after running out of memory: the passes that follow are measured."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no memory")

    model, optimizer = regression()
    handle = pybatch.noise.attach(model, optimizer)
    with pytest.raises(RuntimeError, match="no memory"):
        model(Fails.apply(torch.randn(8, 63, requires_grad=True))).mean().backward()
    optimizer.zero_grad()
    for _ in range(2):
        regression_loss(model, 8).backward()
    optimizer.step()
    assert (handle.noise.steps, handle.noise.large_batch) == (1, 16)


def test_several_forward_passes_of_one_loss_are_said():
    """Only the last one's examples are counted, which a reader must know."""
    model, optimizer = regression()
    handle = pybatch.noise.attach(model, optimizer)
    for _ in range(2):
        (regression_loss(model, 8) + regression_loss(model, 4)).backward()
    optimizer.step()
    assert any("2 backward passes came after several forward passes" in n.text for n in handle.noise.notes)


# Adam's moments.


class Stream(nn.Module):
    """A loss whose gradient is G + xi / sqrt(B): the closed-form stream of noisy gradients."""

    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d))

    def forward(self, gradient):
        return (self.weight * gradient.mean(0)).sum()


def fed(model, optimizer, gradients):
    """A step of each of these gradients, which a `Stream`'s backward pass would only hand on, in half of the time."""
    for gradient in gradients:
        model(gradient)  # is counted
        model.weight.grad = gradient[0]
        optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, AdamW])
def test_moments_against_a_closed_form_stream(kind):
    """A constant gradient with independent noise: |G|^2 = 25 * 0.04, tr(Sigma) = 25 * 4, so B_simple = 100."""
    covered, means = [], []
    for seed in range(6 if kind is torch.optim.AdamW else 2):
        torch.manual_seed(seed)
        model = Stream(25)
        optimizer = kind(model.parameters(), lr=0.0, weight_decay=0.0)
        handle = pybatch.noise.attach(model, optimizer, "adam-moments", examples=16, every=20)
        fed(model, optimizer, (0.2 + 2.0 * torch.randn(1, 25) / 4 for _ in range(1600)))
        noise = handle.whole
        assert (noise.status, noise.steps) == ("resolved", 80)
        assert (handle.noise.first_step, handle.noise.last_step) == (801, 1600)  # training steps, 20 a pair
        covered.append(noise.low <= 100 <= noise.high)
        means.append((noise.grad_sq, noise.trace))
    assert sum(covered) >= len(covered) - 1
    assert np.mean(means, axis=0) == pytest.approx([1.0, 100.0], rel=0.1)
    assert any("averages over windows" in n.text for n in noise.notes)


def test_moments_window_forgets_what_v_remembers():
    """v alone remembers a large early gradient for 1000 steps and calls it noise; the window does not."""
    torch.manual_seed(0)
    model = Stream(25)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    fed(model, optimizer, (20.0 + torch.randn(1, 25) for _ in range(100)))
    fed(model, optimizer, (0.2 + 0.5 * torch.randn(1, 25) for _ in range(200)))  # m has forgotten after these
    handle = pybatch.noise.attach(model, optimizer, "adam-moments", examples=16)
    fed(model, optimizer, (0.2 + 0.5 * torch.randn(1, 25) for _ in range(3000)))
    noise = handle.noise
    assert noise.low <= 100 <= noise.high
    v = optimizer.state[model.weight]["exp_avg_sq"]
    assert float(v.sum()) / 0.9 > 1.5 * (1.0 + 100 / 16)  # what a plain reading of v would take


@pytest.mark.parametrize("kind", [torch.optim.AdamW, AdamW])
def test_moments_of_a_real_model_are_the_loop_over_its_steps(kind):
    """One window: |m|^2 and the window's mean of |g|^2 from the float64 gradients of the steps."""
    model = mlp()
    optimizer = kind(model.parameters(), lr=1e-2)
    handle = pybatch.noise.attach(model, optimizer, "adam-moments", every=6, layers=True)
    m = v = 0.0
    for _ in range(6):
        x, y = images(8)
        g = example_gradients(model, x, y)[0].mean(0)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
        loss_of(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    kappa = sum((0.1 * 0.9**i / (1 - 0.9**6)) ** 2 for i in range(6))
    small, large = float(v.sum()) / (1 - 0.999**6), float((m / (1 - 0.9**6)).square().sum())
    noise = handle.noise
    assert noise.trace == pytest.approx((small - large) / (1 / 8 - kappa / 8), rel=1e-3)
    assert noise.grad_sq == pytest.approx((large - kappa * small) / (1 - kappa), rel=1e-3)
    assert sum(layer.trace for layer in noise.layers) == pytest.approx(noise.trace, rel=1e-6)


@pytest.mark.parametrize("kind", ["scaler", "fused", "count"])
def test_moments_leave_out_steps_that_are_not_finite(kind):
    """Two of eight steps overflow, with twice the examples: the window's pair is that of the six others, of 8 each."""
    model, scaler = mlp(), torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10**6)
    optimizer = (AdamW if kind == "fused" else torch.optim.AdamW)(model.parameters(), lr=1e-2)
    options = {"examples": "count"} if kind == "count" else {}
    calls = 8 if kind == "fused" else 6  # a scaler doesn't call the step of torch's at all
    handle = pybatch.noise.attach(model, optimizer, "adam-moments", every=calls, **options)
    m = v = 0.0
    for step in range(8):
        bad = step in (2, 5)
        x, y = images(16 if bad else 8)
        if not bad:
            g = example_gradients(model, x, y)[0].mean(0)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
        if kind == "count":
            handle.count(len(x))
        scaler.scale(loss_of(model(x), y) * (math.inf if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    kappa = sum((0.1 * 0.9**i / (1 - 0.9**6)) ** 2 for i in range(6))
    small, large = float(v.sum()) / (1 - 0.999**6), float((m / (1 - 0.9**6)).square().sum())
    noise = handle.noise
    assert (noise.steps, noise.small_batch) == (1, pytest.approx(8))
    assert noise.trace == pytest.approx((small - large) / (1 / 8 - kappa / 8), rel=1e-3)
    said = [n.text for n in noise.notes if n.figure == "noise.skipped"]
    assert said
    assert said[0].startswith("in no window: 2 steps" if kind == "fused" else "2 forward passes had no gradient")


def test_bad_arguments():
    model, optimizer = regression()
    adam, plain = torch.optim.Adam(model.parameters(), weight_decay=0.1), torch.optim.Adam(model.parameters())
    rows = torch.optim.SparseAdam(model.parameters())
    for arguments, options, says in (
        ((model,), {}, "needs the optimizer"),
        ((model, optimizer, "forward"), {}, "'forward' is not known"),
        ((model, optimizer, "ddp"), {}, "is not wrapped in"),
        ((model, optimizer, "fsdp"), {}, "is not sharded"),
        ((model, optimizer, "adam-moments"), {}, "Use Adam or AdamW"),
        ((model, adam, "adam-moments"), {}, "adds weight_decay 0.1"),
        ((model, rows, "adam-moments"), {}, "SparseAdam moves the moments of those rows alone"),
        ((model, optimizer), {"examples": 0}, "examples 0"),
        ((model, optimizer), {"accumulation": "median"}, "'median' is not known"),
        ((model, optimizer), {"hook": print}, "no communication"),
        ((model, optimizer), {"hook_state": 1}, "Give hook=... too"),
        ((model, optimizer), {"every": 5}, "every=5: the source 'micro-batches' takes every step"),
        ((model, optimizer, "micro-batches"), {"every": 0}, "every=0: give the steps"),
        ((model, plain, "adam-moments"), {"scaler": object()}, "are of unscaled gradients"),
        ((nn.Tanh(), optimizer), {}, "no parameter to train"),
        ((nn.Sequential(model, nn.Linear(1, 1, device="meta")), optimizer), {}, "are on cpu, meta"),
    ):
        with pytest.raises(UsageError, match=says):
            pybatch.noise.attach(*arguments, **options)
    handle = pybatch.noise.attach(model, optimizer)
    with pytest.raises(UsageError, match="counted already"):
        handle.count(3)
    model.forward = lambda: 0
    with pytest.raises(UsageError, match="got no tensor to count"):
        model()
