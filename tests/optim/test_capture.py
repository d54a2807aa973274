"""Steps captured in a CUDA graph: replayed they equal eager ones, and what can't be captured is refused."""

import pytest
import torch
from cases import problem

from pybatch import _C, ops, optim
from pybatch.base.errors import UsageError

BACKENDS = [
    pytest.param("cuda", marks=pytest.mark.skipif(not _C.cuda, reason="built without CUDA")),
    "triton",
]
KINDS = [optim.SGD, optim.AdamW, optim.Lion, optim.LARS, optim.LAMB]
on_gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).to(p.dtype).to(p.device) for p in params]


def prepared(kind, backend, lr):
    """Two eager steps: the table is built, and gradients have their places."""
    params = problem.tensors(device="cuda", small=True)
    options = {} if kind in (optim.SGD, optim.LARS, optim.LAMB, optim.Lion) else {"capturable": True}
    opt = kind(params, lr=lr, max_grad_norm=1.0, backend=backend, **options)
    for seed in range(2):
        for p, g in zip(params, gradients(params, seed), strict=True):
            p.grad = g if p.grad is None else p.grad.copy_(g)
        opt.step()
    return params, opt


@on_gpu
@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_equal_eager_ones(kind, backend):
    rate = torch.tensor(0.1, device="cuda")
    params, opt = prepared(kind, backend, rate)
    plain, twin = prepared(kind, backend, rate)
    start = [p.detach().clone() for p in params]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, start, strict=True))  # a capture runs nothing
    for seed in range(2, 5):
        rate.fill_(0.1 / seed)
        for tensors in (params, plain):
            for p, g in zip(tensors, gradients(tensors, seed), strict=True):
                p.grad.copy_(g)
        graph.replay()
        twin.step()
    torch.cuda.synchronize()
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))
    assert float(opt.grad_norm) == float(twin.grad_norm)


@on_gpu
@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replayed_accumulation_equals_an_eager_one(backend, dtype):
    """All micro-batches and the step in one graph, whose gradients are where they were in the step before it."""

    def setup():
        params = problem.tensors(dtype, device="cuda", small=True)
        rate = torch.tensor(0.1, device="cuda")
        opt = optim.AdamW(params, lr=rate, capturable=True, max_grad_norm=1.0, noise=True, backend=backend)
        return params, opt, [gradients(params, seed) for seed in range(3)]

    def step(params, opt, grads):
        for micro in grads:
            for p, g in zip(params, micro, strict=True):
                p.grad = g
            opt.accumulate(4)
        opt.step()

    def give(params, grads, seed):
        for i, micro in enumerate(grads):
            torch._foreach_copy_(micro, gradients(params, 10 * seed + i))

    captured, eager = setup(), setup()
    for side in (captured, eager):
        step(*side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*captured)
    for seed in range(1, 4):
        for params, _, grads in (captured, eager):
            give(params, grads, seed)
        graph.replay()
        step(*eager)
    torch.cuda.synchronize()
    assert all(torch.equal(p, q) for p, q in zip(captured[0], eager[0], strict=True))
    assert captured[1].noise.b_simple == eager[1].noise.b_simple


@on_gpu
@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_write_of_others_before_a_capture_is_followed(backend):
    """Weights loaded after the warm-up, as torch's notes on CUDA graphs do."""
    rate = torch.tensor(0.1, device="cuda")
    (params, opt), (plain, twin) = prepared(optim.LARS, backend, rate), prepared(optim.LARS, backend, rate)
    with torch.no_grad():
        for p in (*params, *plain):
            p.mul_(3.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for _ in range(2):
        graph.replay()
        twin.step()
    torch.cuda.synchronize()
    for p, q in zip(params, plain, strict=True):  # the norms are taken anew by every replay, once by the other
        torch.testing.assert_close(p, q, rtol=1e-6, atol=0.0)


@on_gpu
@needs_gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch's, of a capture that was refused at once
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", ["gradient", "lr", "state"])
def test_what_would_need_an_upload_is_refused_in_a_capture(backend, change):
    params, opt = prepared(optim.AdamW, backend, 0.1)
    if change == "gradient":
        params[0].grad = params[0].grad.clone()
    elif change == "lr":
        opt.param_groups[0]["lr"] = 0.2
    else:
        opt.state[params[0]]["exp_avg"] = torch.zeros_like(opt.state[params[0]]["exp_avg"])
    with pytest.raises(UsageError, match="capture of a CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.step()
    torch.cuda.synchronize()
    opt.step()  # outside it is taken


@on_gpu
@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [optim.AdamW, optim.LAMB, optim.LARS, optim.Muon])
@pytest.mark.parametrize("master", [False, True, "remainder"])
def test_no_wait_for_the_device(kind, backend, master):
    params = problem.tensors(torch.bfloat16, device="cuda", small=True)
    opt = kind(params, lr=0.1, max_grad_norm=1.0, noise=True, master_weights=master, backend=backend)
    for checked in (False, True):  # the first step builds the table, which may wait
        batches = [gradients(params, seed) for seed in range(2)]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if checked else "default")
        try:
            for grads in batches:
                for p, g in zip(params, grads, strict=True):
                    p.grad = g
                opt.accumulate(4)
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_following_the_writes_of_others_uploads_nothing(monkeypatch):
    """An upload in a capture would be read again by every replay, from host memory given back long since."""
    params = [torch.nn.Parameter(torch.full((4,), 1.0 + i)) for i in range(20)]
    opt = optim.LARS(params, lr=0.1, skip=False)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    carried = opt._tables.first.carried
    monkeypatch.setattr(torch, "as_tensor", None)  # what an upload is made by
    for count in (1, 8, 9):
        opt.step()
        assert not carried.isnan().any()
        with torch.no_grad():
            for p in params[:count]:
                p.mul_(2.0)
        opt._tables._follow_writes()
        assert int(carried.isnan().sum()) == (count if count < 9 else 20)


def test_refusal_names_cause_and_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(UsageError, match=r"a hyper-parameter has changed.*set_to_none=False.*accumulate\(\).*lr as a"):
        ops.refuse_capture(torch.device("cuda:0"), "a hyper-parameter has changed")
    ops.refuse_capture(torch.device("cpu"), "a hyper-parameter has changed")
