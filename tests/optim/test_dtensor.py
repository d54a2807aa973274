"""DTensor parameters on two processes: the trajectory is the single process's, whatever the placement."""

import os
import subprocess
from functools import cache

import numpy as np
import pytest
import torch
from cases import dtensor_worker as worker
from cases.paths import TESTS

from pybatch import optim


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, warm_python):
    """What two processes found, all in one start of them."""
    folder = tmp_path_factory.mktemp("dtensor")
    output = folder / "found.pt"
    command = [warm_python, worker.__file__]
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


@cache
def single(kind, accumulate):
    """The same for every placement."""
    params = [torch.nn.Parameter(p.detach().clone()) for p in worker.model().parameters()]
    return worker.outcome(worker.train(kind, params, accumulate=accumulate), params)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "adamw", "lamb", "lars", "muon"])
@pytest.mark.parametrize("placement", ["sharded", "replicated", "mixed", "plane"])
def test_trajectory_norm_and_noise_are_the_single_process_ones(sharded, placement, kind, accumulate):
    wanted, found = single(kind, accumulate), sharded[placement, kind, accumulate]
    for p, q in zip(wanted["params"], found["params"], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["norm"], wanted["norm"], rtol=1e-6)
    if accumulate:
        np.testing.assert_allclose(found["noise"], wanted["noise"], rtol=1e-5)
        np.testing.assert_allclose(found["layers"], wanted["layers"], rtol=1e-4)


@pytest.mark.parametrize("placed", list(worker.MATRICES))
def test_sharded_matrices_convolutions_and_experts_go_by_muon_as_whole_ones(sharded, placed):
    for wanted, found in zip(worker.by_muon(worker.odd()), sharded["matrices", placed], strict=True):
        assert torch.equal(wanted[1], found[1])
        torch.testing.assert_close(wanted[0], found[0], rtol=1e-5, atol=1e-6)


def in_one_process(kind):
    """As worker.by_zero, with nothing distributed."""
    maker, options = worker.KINDS[kind]
    options = options | worker.MUON_RATES if kind == "muon" else options
    params = list(worker.model().parameters())
    opt = maker(params, lr=0.05, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)
    worker.steps_of(opt, params, range(2))
    schedule.step()
    states = [{name: torch.as_tensor(value).clone() for name, value in opt.state[p].items()} for p in params]
    worker.steps_of(opt, params, range(2, 4))
    return [p.detach() for p in params], states


@pytest.mark.parametrize("kind", list(worker.KINDS))
def test_zero_trains_and_saves_as_one_process(sharded, kind):
    params, states = in_one_process(kind)
    found, saved = sharded["zero", kind]
    for p, q in zip(params, found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    for i, state in enumerate(states):
        assert state.keys() == saved["state"].get(i, {}).keys()
        for name, value in state.items():
            torch.testing.assert_close(value, torch.as_tensor(saved["state"][i][name]), rtol=1e-6, atol=1e-7)


def test_one_process_loads_what_zero_has_saved_of_muon(sharded):
    _, saved = sharded["zero", "muon"]
    params = list(worker.model().parameters())
    opt = optim.Muon([{"params": params, "use_muon": None}], lr=9.0)
    opt.load_state_dict(saved)
    assert [(group["lr"], group["adamw_lr"]) for group in opt.param_groups] == [(0.025, 0.02)]
    for i, param in enumerate(params):
        assert opt.state[param].keys() == saved["state"][i].keys()
        for name, value in opt.state[param].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(saved["state"][i][name]))


def test_zero_takes_groups_by_name_and_late_ones(sharded):
    params = list(worker.model().parameters())
    groups = [{"params": params[:1], "use_muon": True}, {"params": params[1:], "use_muon": False}]
    worker.steps_of(optim.Muon(groups, lr=0.05, adamw_lr=0.02), params, range(worker.STEPS))
    for p, q in zip(params, sharded["zero", "groups"], strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-5, atol=1e-6)


def test_zero_refuses_norms_that_would_be_of_one_process(sharded):
    clip, noise = sharded["zero", "refusals"]
    assert "max_grad_norm=1.0 in ZeroRedundancyOptimizer" in clip
    assert "clip_grad_norm_" in clip
    assert "noise=True in ZeroRedundancyOptimizer" in noise


def plain(kind, steps):
    net = worker.model()
    maker, options = worker.KINDS[kind]
    opt = maker(net.parameters(), lr=0.05, max_grad_norm=0.1, **options)
    for step in steps:
        (net(worker.data(step, 4)) ** 2).sum(1).mean().backward()
        opt.step()
        opt.zero_grad()
    return net, opt


@pytest.mark.parametrize("kind", ["sgd", "adamw", "lamb", "muon"])
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
