"""Noise statistics of the CPU core, of all tensors together and of each alone."""

import math

import numpy as np
import torch
from cases import lists

from pybatch import ops
from pybatch.fits import noise as estimator

RATIO = len(ops.Ledger(torch.device("cpu")).ring) // 32  # rows of the global ring in one of a tensor's


def make(counts):
    layers = torch.zeros(len(counts), ops.LAYER_SIZE, dtype=torch.float64)
    return lists.Setup(lists.draw(counts, seed=5), "Sgd", layers=layers)


def noisy_step(setup, micro, numbers, **scalars):
    """One step of these micro-batch gradients over so many examples each."""
    for i, (grads, n) in enumerate(zip(micro, numbers, strict=True)):
        setup.accumulate(grads, n, first=not i, weight=n / numbers[0])
    setup.step(
        [None] * len(setup.params),
        sum=True,
        known=True,
        noise=len(micro) > 1,
        inverse=numbers[0] / sum(numbers),
        examples=sum(numbers),
        micro_batches=len(micro),
        **scalars,
    )


def rings(setup):
    return setup.layers[:, ops.LAYER_SUMS :].view(len(setup.params), -1, 3).numpy()


def test_each_tensor_has_the_pair_of_its_own_norms():
    setup = make([5, 300, 0, 40_000])
    numbers = [3.0, 8.0, 5.0]
    micro = [lists.draw([5, 300, 0, 40_000], seed=i) for i in range(3)]
    noisy_step(setup, micro, numbers)
    for i, ring in enumerate(rings(setup)):
        gs = [grads[i].double() for grads in micro]
        small = sum(n * float(g @ g) for n, g in zip(numbers, gs, strict=True)) / 16
        mean = sum(n * g for n, g in zip(numbers, gs, strict=True)) / 16
        pair = estimator.pair(small, float(mean @ mean), 16 / 3, 16.0)
        np.testing.assert_allclose(ring[0], [1.0, *pair], rtol=1e-5)
        assert not ring[1:].any()
    total = setup.ledger.ring[0].numpy()
    np.testing.assert_allclose(rings(setup)[:, 0, 1:].sum(0), total[1:], rtol=1e-12)


def test_a_tensors_ring_follows_the_schedule_of_the_global_one():
    setup = make([3])
    generator = torch.Generator().manual_seed(0)
    for step in range(1300):
        noisy_step(setup, [[torch.randn(3, generator=generator)] for _ in range(2)], [2.0, 4.0])
        if step % 100 == 99:
            merged = setup.ledger.ring.numpy().reshape(32, RATIO, 3).sum(1)
            np.testing.assert_allclose(rings(setup)[0], merged, rtol=1e-12)
    assert rings(setup)[0][:, 0].sum() == 1300


def test_without_gradient_there_is_no_pair():
    setup = make([4, 6])
    for i in range(3):
        micro = [lists.draw([4, 6], seed=2 * i + k) for k in range(2)]
        for k, grads in enumerate(micro):
            setup.accumulate(grads, 4.0, first=not k)
        setup.list.set("sum", [setup.sums[0].data_ptr(), 0 if i == 1 else setup.sums[1].data_ptr()])
        setup.step([None, None], sum=True, known=True, noise=True, inverse=0.5, examples=8.0, micro_batches=2.0)
        setup.list.set("sum", [s.data_ptr() for s in setup.sums])
    assert rings(setup)[:, :, 0].sum(1).tolist() == [3.0, 2.0]


def test_skipped_and_single_steps_give_no_pair_and_leave_no_sums():
    setup = make([4])
    noisy_step(setup, [lists.draw([4], seed=1)], [4.0])
    noisy_step(setup, [[torch.tensor([math.nan, 0.0, 0.0, 0.0])], lists.draw([4], seed=2)], [4.0, 4.0])
    assert not setup.layers.any()
    setup.accumulate(lists.draw([4], seed=3), 4.0, first=True)
    assert setup.layers[0, : ops.LAYER_SUMS].all()
    setup.list.discard()
    assert not setup.layers.any()
    assert not setup.ledger.sums.any()
