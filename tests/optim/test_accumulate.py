"""accumulate(n): the mean over all examples, and the noise statistics that come with it."""

import copy

import numpy as np
import pytest
import torch
from cases import adamw, problem, sgd

from pybatch.base.errors import UsageError
from pybatch.fits.noise import pair

each_optimizer = pytest.mark.parametrize("case", [adamw, sgd], ids=["adamw", "sgd"])
COUNTS = (8, 3, 5, 1)  # examples of the micro-batches of a step


def micro_batches(params, generator, absent=()):
    """Gradients of one step's micro-batches, float64, and given to nobody yet; (micro-batch, tensor) absent: None."""
    for k, n in enumerate(COUNTS):
        problem.give_gradients(params, generator)
        for i, p in enumerate(params):
            if (k, i) in absent:
                p.grad = None
        yield n, [None if p.grad is None else problem.double(p.grad) for p in params]


def mean_of(collected, params):
    """Mean over examples in float64; None where no micro-batch had a gradient."""
    total = sum(n for n, _ in collected)
    means = []
    for i in range(len(params)):
        parts = [n * grads[i] for n, grads in collected if grads[i] is not None]
        means.append(sum(parts) / total if parts else None)
    return means


@each_optimizer
@pytest.mark.parametrize("dtype", problem.DTYPES, ids=str)
@pytest.mark.parametrize("absent", [(), {(0, 3), (2, 3), (1, 5), *((k, 4) for k in range(4))}], ids=["all", "some"])
def test_step_uses_the_mean_over_all_examples(case, dtype, absent):
    params = problem.tensors(dtype)
    opt = case.optimizer(params, lr=case.LR, max_grad_norm=50.0)
    start = [problem.double(p) for p in params]
    wanted, states = [s.copy() for s in start], [{} for _ in params]
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        collected = []
        for n, grads in micro_batches(params, generator, absent):
            collected.append((n, grads))
            opt.accumulate(n)
            assert all(p.grad is None for p in params)
        means = mean_of(collected, params)
        norm = problem.global_norm([g for g in means if g is not None])
        for i, g in enumerate(means):
            if g is not None:
                new = case.reference(wanted[i], g * min(1.0, 50.0 / (norm + 1e-6)), states[i], case.LR)
                wanted[i] = problem.double(torch.from_numpy(np.asarray(new)).to(dtype))
        opt.step()
        np.testing.assert_allclose(float(opt.grad_norm), norm, rtol=1e-6)
    problem.assert_follows(problem.compare(params, wanted, start), dtype)


def test_a_plain_mean_over_micro_batches_fails_the_same_check():
    params = problem.tensors()
    opt = sgd.optimizer(params, lr=sgd.LR)
    start = [problem.double(p) for p in params]
    collected = []
    for n, grads in micro_batches(params, torch.Generator().manual_seed(0)):
        collected.append(grads)
        opt.accumulate(n)
    opt.step()
    wrong = [s - sgd.LR * np.mean(gs, axis=0) for s, *gs in zip(start, *collected, strict=True)]
    with pytest.raises(AssertionError):
        problem.assert_follows(problem.compare(params, wrong, start), torch.float32)


def test_two_threads_and_one_give_the_same_bits():
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            params = problem.tensors()
            opt = adamw.optimizer(params, noise=True, max_grad_norm=1.0)
            generator = torch.Generator().manual_seed(0)
            for _ in range(2):
                for n, _ in micro_batches(params, generator):
                    opt.accumulate(n)
                opt.step()
            results.append([*params, opt._ledger.ring.clone()])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_gradient_that_is_a_view_or_is_shared_is_not_written():
    bucket = torch.ones(8)  # as DDP's gradient_as_bucket_view
    p, q, r = (torch.nn.Parameter(torch.zeros(4)) for _ in range(3))
    opt = sgd.optimizer([p, q, r], lr=1.0)
    for _ in range(3):
        p.grad = bucket[:4]
        q.grad = r.grad = torch.full((4,), 2.0)
        opt.accumulate(2)
    assert torch.equal(bucket, torch.ones(8))
    opt.step()
    assert [float(x[0].detach()) for x in (p, q, r)] == [-1.0, -2.0, -2.0]


def test_a_buffer_given_as_gradient_twice_is_refused():
    """The first became the sum; what is written to it afterwards would change the sum."""
    p, q = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    opt = sgd.optimizer([p, q], lr=1.0)
    buffer = torch.ones(4)
    p.grad = buffer
    opt.accumulate(2)
    q.grad = buffer
    with pytest.raises(UsageError, match=r"gradient of parameter 1 .* same memory .* clone"):
        opt.accumulate(2)


def test_zero_grad_discards_the_sum():
    p = torch.nn.Parameter(torch.zeros(3))
    opt = sgd.optimizer([p], lr=1.0, noise=True)
    p.grad = torch.full((3,), float("nan"))
    opt.accumulate(4)
    opt.zero_grad()
    opt.step()
    assert torch.equal(p, torch.zeros(3))
    for _ in range(2):
        p.grad = torch.ones(3)
        opt.accumulate(4)
    opt.step()
    assert opt.skipped == 0
    assert torch.equal(p, -torch.ones(3))


def test_non_finite_micro_batch_skips_the_whole_step():
    p = torch.nn.Parameter(torch.zeros(3))
    opt = sgd.optimizer([p], lr=1.0, noise=True)
    for value in (1.0, float("inf"), 1.0):
        p.grad = torch.full((3,), value)
        opt.accumulate(2)
    opt.step()
    assert torch.equal(p, torch.zeros(3))
    assert opt.skipped == 1
    assert opt.noise.steps == 0
    assert opt.noise.skipped == 1


@pytest.mark.parametrize("n", [0, -3, float("nan"), float("inf"), "8", None])
def test_count_must_be_above_zero(n):
    p = torch.nn.Parameter(torch.zeros(3))
    opt = sgd.optimizer([p])
    p.grad = torch.ones(3)
    with pytest.raises(UsageError, match="number of examples"):
        opt.accumulate(n)
    assert p.grad is not None


def test_no_gradient_to_accumulate():
    opt = sgd.optimizer([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(UsageError, match=r"loss.backward\(\)"):
        opt.accumulate(4)


def test_step_refuses_a_gradient_that_was_not_accumulated():
    p, q = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))
    opt = sgd.optimizer([p, q])
    p.grad = torch.ones(3)
    opt.accumulate(4)
    q.grad = torch.ones(2)
    with pytest.raises(UsageError, match=r"parameter 1 of shape \(2,\) has a gradient that was not accumulated"):
        opt.step()
    assert torch.equal(p, torch.zeros(3))
    opt.accumulate(4)
    opt.step()
    assert float(p[0].detach()) < 0


def test_grad_scaler_after_accumulate_is_refused():
    p = torch.nn.Parameter(torch.zeros(3))
    opt = sgd.optimizer([p])
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(p.sum()).backward()
    opt.accumulate(4)
    with pytest.raises(UsageError, match="consumed"):
        scaler.step(opt)


def collect_pairs(steps, seed=0, opt=None, params=None, scale=None):
    """Drive the optimizer and return the pairs a float64 hand computation gives, one row a step."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(steps):
        collected = []
        for n, grads in micro_batches(params, generator):
            collected.append((n, grads))
            if scale is not None:
                for p in params:
                    p.grad *= scale
            opt.accumulate(n)
        opt.step()
        total = sum(COUNTS)
        small = sum(n * problem.global_norm(grads) ** 2 for n, grads in collected) / total
        large = problem.global_norm(mean_of(collected, params)) ** 2
        rows.append([1.0, *pair(small, large, total / len(COUNTS), total)])
    return np.array(rows)


@each_optimizer
def test_pairs_equal_a_hand_computation(case):
    params = problem.tensors(small=True)
    opt = case.optimizer(params, lr=1e-3, noise=True, max_grad_norm=0.1)  # clipping must not enter
    rows = collect_pairs(10, opt=opt, params=params)
    ring = opt._ledger.ring.clone().numpy()
    np.testing.assert_allclose(ring[:10], rows, rtol=1e-5, atol=1e-4)
    assert not ring[10:].any()
    noise = opt.noise
    assert (noise.steps, noise.small_batch, noise.large_batch) == (10, 17 / 4, 17)
    assert noise.source == "micro-batches"


def test_pairs_are_of_the_unscaled_gradient():
    params = problem.tensors(small=True)
    opt = sgd.optimizer(params, lr=1e-3, noise=True)
    opt.grad_scale = torch.tensor(256.0)
    rows = collect_pairs(3, opt=opt, params=params, scale=256.0)
    np.testing.assert_allclose(opt._ledger.ring.clone().numpy()[:3], rows, rtol=1e-5, atol=1e-4)


def test_ring_folds_and_loses_no_pair():
    params = [torch.nn.Parameter(torch.zeros(3))]
    opt = sgd.optimizer(params, lr=0.0, noise=True)
    rows = collect_pairs(700, opt=opt, params=params)
    ring = opt._ledger.ring.clone().numpy()
    np.testing.assert_allclose(ring.sum(axis=0), rows.sum(axis=0), rtol=1e-6)
    padded = np.zeros((1024, 3))
    padded[:700] = rows
    np.testing.assert_allclose(ring, padded.reshape(256, 4, 3).sum(axis=1), rtol=1e-5, atol=1e-6)


def test_noise_scale_of_known_truth():
    """Gradients G + N(0, Sigma) per example: B_simple = tr(Sigma) / |G|^2 lies in the interval."""
    d, sigma = 400, 3.0
    p = torch.nn.Parameter(torch.zeros(d))
    opt = sgd.optimizer([p], lr=0.0, noise=True)
    generator = torch.Generator().manual_seed(7)
    for _ in range(100):
        for n in (4, 8, 4):
            p.grad = 1.0 + torch.randn(n, d, generator=generator).mul(sigma).mean(0)
            opt.accumulate(n)
        opt.step()
    noise = opt.noise
    assert noise.status == "resolved"
    assert noise.low < sigma**2 < noise.high
    np.testing.assert_allclose(noise.b_simple, sigma**2, rtol=0.1)


def test_statistics_survive_a_state_dict():
    params = problem.tensors(small=True)
    opt = adamw.optimizer(params, noise=True)
    collect_pairs(20, opt=opt, params=params)
    again = adamw.optimizer(params, noise=True)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert again.noise == opt.noise
    collect_pairs(5, seed=1, opt=again, params=params)
    assert again.noise.steps == 25


def test_steps_of_one_micro_batch_give_no_pair_and_are_counted():
    p = torch.nn.Parameter(torch.zeros(3))
    opt = sgd.optimizer([p], noise=True)
    for _ in range(3):
        p.grad = torch.ones(3)
        opt.accumulate(4)
        opt.step()
    noise = opt.noise
    assert (noise.status, noise.b_simple, noise.steps) == ("unresolved", None, 0)
    assert any("3 steps had one micro-batch" in note.text for note in noise.notes)


def test_noise_must_be_asked_for():
    opt = sgd.optimizer([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(UsageError, match="noise=True"):
        _ = opt.noise
