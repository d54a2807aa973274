"""accumulating(n): the same sums as accumulate(n), with one bucket of gradients in memory instead of all of them."""

import numpy as np
import pytest
import torch
from cases import adamw, sgd

from pybatch import optim
from pybatch.base.errors import UsageError
from pybatch.optim._engine import accumulation, tables

WIDTH, DEPTH = 32, 8
LAYER_BYTES = 4 * WIDTH * WIDTH


@pytest.fixture
def bucket(monkeypatch):
    """Two layers' gradients make a bucket."""
    monkeypatch.setattr(accumulation, "BUCKET_BYTES", 2 * LAYER_BYTES)
    return 2 * LAYER_BYTES


def model(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(DEPTH)]
    return torch.nn.Sequential(*layers)


def batches(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, WIDTH, generator=generator).to(dtype) for n in (3, 8, 5)]


def loss_of(net, x):
    return (net(x) ** 2).sum(1).mean()


def run(kind, in_backward, steps=3, dtype=torch.float32, **options):
    net = model(dtype)
    opt = kind(net.parameters(), lr=1e-2, **options)
    for step in range(steps):
        for x in batches(dtype, step):
            if in_backward:
                with opt.accumulating(len(x)):
                    loss_of(net, x).backward()
            else:
                loss_of(net, x).backward()
                opt.accumulate(len(x))
            assert all(p.grad is None for p in net.parameters())
        opt.step()
    return opt, [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW, optim.LARS, optim.LAMB])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_accumulate(bucket, kind, dtype):
    first, a = run(kind, False, dtype=dtype, max_grad_norm=0.5, noise=True)
    second, b = run(kind, True, dtype=dtype, max_grad_norm=0.5, noise=True)
    for p, q in zip(a, b, strict=True):
        assert torch.equal(p, q) or torch.allclose(p, q, rtol=1e-5 if dtype == torch.float32 else 0.01, atol=0)
    np.testing.assert_allclose(float(first.grad_norm), float(second.grad_norm), rtol=1e-6)
    one, other = first.noise, second.noise
    assert (one.steps, one.small_batch, one.large_batch) == (other.steps, other.small_batch, other.large_batch)
    np.testing.assert_allclose(one.grad_sq, other.grad_sq, rtol=1e-5)
    np.testing.assert_allclose(one.trace, other.trace, rtol=1e-5)
    assert [layer.name for layer in one.layers] == [layer.name for layer in other.layers]
    np.testing.assert_allclose(
        [(layer.grad_sq, layer.trace) for layer in one.layers],
        [(layer.grad_sq, layer.trace) for layer in other.layers],
        rtol=1e-5,
    )


def peak(net, opt, in_backward):
    """Largest number of bytes held in .grad at once, counted whenever a parameter got its gradient."""
    most, hooks = 0, []

    def count(_):
        nonlocal most
        most = max(most, sum(p.grad.nbytes for p in net.parameters() if p.grad is not None))

    for p in net.parameters():
        hooks.append(p.register_post_accumulate_grad_hook(count))
    for x in batches():
        if in_backward:
            with opt.accumulating(len(x)):
                loss_of(net, x).backward()
        else:
            loss_of(net, x).backward()
            opt.accumulate(len(x))
    for hook in hooks:
        hook.remove()
    return most


def test_no_more_than_a_bucket_of_gradients_is_held(bucket):
    net = model()
    opt = sgd.optimizer(net.parameters(), lr=0.0)
    assert peak(net, opt, in_backward=False) == DEPTH * LAYER_BYTES
    assert peak(net, opt, in_backward=True) <= bucket


def test_one_gradient_above_a_bucket_is_flushed_alone(monkeypatch):
    monkeypatch.setattr(accumulation, "BUCKET_BYTES", 1)
    net = model()
    opt = adamw.optimizer(net.parameters(), lr=0.0)
    assert peak(net, opt, in_backward=True) == LAYER_BYTES


def test_parameters_that_get_no_gradient_keep_their_sum(bucket):
    """An expert used by one micro-batch only: its sum stays, and so does its part of the norm."""
    ends = []
    for in_backward in (False, True):
        p, q = (torch.nn.Parameter(torch.ones(40)) for _ in range(2))
        opt = sgd.optimizer([p, q], lr=1.0, max_grad_norm=1e9, noise=True)
        for n, used in ((2, (p, q)), (4, (p,)), (2, (q,))):
            loss = sum((i + 1.0) * t.sum() for i, t in enumerate(used))
            if in_backward:
                with opt.accumulating(n):
                    loss.backward()
            else:
                loss.backward()
                opt.accumulate(n)
        opt.step()
        ends.append((p.detach(), q.detach(), float(opt.grad_norm), opt.noise.grad_sq))
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_mixed_with_accumulate(bucket):
    net, twin = model(), model()
    opt, plain = (adamw.optimizer(m.parameters(), lr=1e-2, max_grad_norm=0.1) for m in (net, twin))
    for i, x in enumerate(batches()):
        if i % 2:
            with opt.accumulating(len(x)):
                loss_of(net, x).backward()
        else:
            loss_of(net, x).backward()
            opt.accumulate(len(x))
        loss_of(twin, x).backward()
        plain.accumulate(len(x))
    opt.step()
    plain.step()
    np.testing.assert_allclose(float(opt.grad_norm), float(plain.grad_norm), rtol=1e-6)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5)


def test_a_non_finite_micro_batch_skips_the_step(bucket):
    net = model()
    opt = sgd.optimizer(net.parameters(), lr=1.0)
    before = [p.detach().clone() for p in net.parameters()]
    for bad in (False, True, False):
        with opt.accumulating(2):
            (loss_of(net, batches()[0]) * (float("inf") if bad else 1.0)).backward()
    opt.step()
    assert opt.skipped == 1
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_an_exception_discards_the_step_and_leaves_no_hook(bucket):
    net = model()
    opt = sgd.optimizer(net.parameters(), lr=1.0)
    before = [p.detach().clone() for p in net.parameters()]

    def fail():
        with opt.accumulating(2):
            loss_of(net, batches()[0]).backward()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    loss_of(net, batches()[0]).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_gradient_from_before_is_refused_and_kept(bucket):
    net = model()
    opt = sgd.optimizer(net.parameters(), lr=1.0)
    loss_of(net, batches()[0]).backward()
    opt.accumulate(3)
    sums = opt._sums.tensors
    loss_of(net, batches()[0]).backward()
    with (
        pytest.raises(UsageError, match=r"parameter 0 of shape \(32, 32\) has a gradient already"),
        opt.accumulating(2),
    ):
        pass
    assert opt._sums.tensors is sums
    assert all(p.grad is not None for p in net.parameters())


def test_two_backwards_are_refused(bucket):
    net = model()
    opt = sgd.optimizer(net.parameters(), lr=1.0)

    def twice():
        with opt.accumulating(2):
            for x in batches()[:2]:
                loss_of(net, x).backward()

    with pytest.raises(UsageError, match="in two parts"):
        twice()


def test_a_gradient_written_again_is_refused(bucket):
    """As DistributedDataParallel does, whose all-reduce ends after the hooks."""
    net = model()
    opt = sgd.optimizer(net.parameters(), lr=1.0)

    def late():
        with opt.accumulating(2):
            loss_of(net, batches()[0]).backward()
            net[-1].weight.grad = torch.ones(WIDTH, WIDTH)

    with pytest.raises(UsageError, match=r"parameter 7 of shape \(32, 32\) was written again.*no_sync"):
        late()


def test_no_gradient_and_bad_counts_are_refused():
    net = model()
    opt = sgd.optimizer(net.parameters(), lr=1.0)
    with pytest.raises(UsageError, match="no parameter got a gradient"), opt.accumulating(2):
        pass
    with pytest.raises(UsageError, match="above 0"):
        opt.accumulating(0)


def test_tables_of_buckets_do_not_pile_up_where_every_step_has_others(bucket, monkeypatch):
    monkeypatch.setattr(tables, "MAX_PARTS", 2)
    net = model()
    opt = optim.SGD(net.parameters(), lr=1e-2, max_grad_norm=1.0)
    x = batches()[0]
    for first in range(DEPTH - 1):
        with opt.accumulating(len(x)):
            loss_of(net[first:], x).backward()
        wanted = [p.detach().clone() for p in net.parameters()]
        grads = torch.autograd.grad(loss_of(net[first:], x), list(net[first:].parameters()))
        norm = float(sum((g.double() ** 2).sum() for g in grads)) ** 0.5
        opt.step()
        for p, g in zip(wanted[first:], grads, strict=True):
            p.sub_(g, alpha=1e-2 * min(1.0, 1.0 / (norm + 1e-6)))
        for p, q in zip(net.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.detach(), q, rtol=1e-5, atol=1e-7)
    assert len(opt._tables._parts) <= 2
