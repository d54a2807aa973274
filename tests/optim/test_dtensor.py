"""DTensor parameters on two processes: the trajectory is the single process's, whatever the placement."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import dtensor_worker as worker
from cases.paths import TESTS

from pybatch import optim

pytestmark = pytest.mark.slow(seconds=1)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """What two processes found, all in one start of them."""
    folder = tmp_path_factory.mktemp("dtensor")
    output = folder / "found.pt"
    command = [sys.executable, worker.__file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    running = [
        subprocess.Popen(
            [*command, str(rank), str(folder / "rendezvous"), str(output)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors)
    return torch.load(output, weights_only=False)


def single(kind, accumulate):
    params = [torch.nn.Parameter(p.detach().clone()) for p in worker.model().parameters()]
    return worker.outcome(worker.train(kind, params, accumulate=accumulate), params)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "adamw", "lamb", "lars"])
@pytest.mark.parametrize("placement", ["sharded", "replicated", "mixed", "plane"])
def test_trajectory_norm_and_noise_are_the_single_process_ones(sharded, placement, kind, accumulate):
    wanted, found = single(kind, accumulate), sharded[placement, kind, accumulate]
    for p, q in zip(wanted["params"], found["params"], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["norm"], wanted["norm"], rtol=1e-6)
    if accumulate:
        np.testing.assert_allclose(found["noise"], wanted["noise"], rtol=1e-5)
        np.testing.assert_allclose(found["layers"], wanted["layers"], rtol=1e-4)


def test_replicated_matrices_go_by_muon(sharded):
    wanted, found = single("muon", False), sharded["replicated", "muon", False]
    for p, q in zip(wanted["params"], found["params"], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def plain(kind, steps):
    net = worker.model()
    maker, options = worker.KINDS[kind]
    opt = maker(net.parameters(), lr=0.05, max_grad_norm=0.1, **options)
    for step in steps:
        (net(worker.data(step, 4)) ** 2).sum(1).mean().backward()
        opt.step()
        opt.zero_grad()
    return net, opt


@pytest.mark.parametrize("kind", ["sgd", "adamw", "lamb"])
def test_fully_sharded_model_trains_as_the_plain_one(sharded, kind):
    net, opt = plain(kind, range(worker.STEPS))
    params, norm = sharded["fsdp", kind]
    for p, q in zip(net.parameters(), params, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(norm, float(opt.grad_norm), rtol=1e-5)


def test_micro_batches_of_a_fully_sharded_model(sharded):
    net = worker.model()
    opt = optim.AdamW(net.parameters(), lr=0.05, max_grad_norm=0.1, noise=True)
    for step in range(worker.STEPS):
        for n in worker.COUNTS:
            (net(worker.data(step, n)) ** 2).sum(1).mean().backward()
            opt.accumulate(n)
        opt.step()
    for name in ("accumulate", "accumulating"):
        params, norm, trace = sharded[name]
        for p, q in zip(net.parameters(), params, strict=True):
            torch.testing.assert_close(p.detach(), q, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose((norm, trace), (float(opt.grad_norm), opt.noise.trace), rtol=1e-4)


def test_distributed_checkpoint_goes_on_and_states_are_sharded(sharded):
    params, placed = sharded["resumed"]
    assert placed
    net, _ = plain("adamw", [*range(worker.STEPS), 7])
    for p, q in zip(net.parameters(), params, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-4, atol=1e-6)


def test_a_partial_parameter_is_refused_and_a_partial_gradient_summed(sharded):
    assert "parameter 0 of shape (3,) is a DTensor with placements (Partial(sum),)" in sharded["refusal"]
    assert torch.equal(sharded["partial"], torch.full((3,), -3.0))
