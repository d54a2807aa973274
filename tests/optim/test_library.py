"""The operators torch.ops.pybatch.step and .accumulate: what they declare is what they do, compiled or not."""

import pytest
import torch
from cases import problem

from pybatch import ops, optim
from pybatch.base.errors import UsageError
from pybatch.optim import library

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
LR = 0.1
HYPER = ops.RULES["AdamW"].row(LR, {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01})


def step_arguments(storage="float32", count=3, max_norm=1.0):
    """AdamW over a few small tensors."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, storage.split("_")[0])
    params = [torch.randn(n + 2, 3, generator=generator).to(dtype) for n in range(count)]
    ledger = ops.Ledger(torch.device("cpu"))
    hyper = torch.tensor([HYPER], dtype=torch.float64)
    masters = [p.float() if storage.endswith("master") else torch.empty(0) for p in params]
    return {
        "params": params,
        "grads": [torch.randn(p.shape, generator=generator).to(dtype) for p in params],
        "states": [torch.zeros(p.shape) for p in params for _ in range(2)],
        "masters": masters,
        "steps": torch.zeros(count),
        "ledger": ledger.values,
        "ring": ledger.ring,
        "hyper": hyper,
        "rules": [ops.RULES["AdamW"].number] * count,
        "rows": [0] * count,
        "storages": [ops.STORAGES[storage]] * count,
        "max_norm": max_norm,
    }


def accumulate_arguments(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    ledger = ops.Ledger(torch.device("cpu"))
    sums = [torch.randn(n + 2, 3, generator=generator) for n in range(3)]
    grads = [torch.randn(s.shape, generator=generator).to(dtype) for s in sums]
    return {"sums": sums, "grads": grads, "ledger": ledger.values, "ring": ledger.ring, "examples": 4.0, "weight": 0.5}


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "bfloat16_master"])
def test_step_passes_opcheck(storage):
    torch.library.opcheck(library.step, (), step_arguments(storage), test_utils=CHECKS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accumulate_passes_opcheck(dtype):
    torch.library.opcheck(library.accumulate, (), accumulate_arguments(dtype), test_utils=CHECKS)


@pytest.mark.parametrize("compiled", [False, True])
def test_step_is_the_optimizers(compiled):
    arguments = step_arguments()
    params = [torch.nn.Parameter(p.clone()) for p in arguments["params"]]
    opt = optim.AdamW(params, lr=LR, max_grad_norm=1.0)

    def twice():
        for _ in range(2):
            torch.ops.pybatch.step(**arguments)

    (torch.compile(twice, backend="aot_eager") if compiled else twice)()
    for _ in range(2):
        for p, g in zip(params, arguments["grads"], strict=True):
            p.grad = g
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(arguments["params"], params, strict=True))
    assert torch.equal(arguments["steps"], torch.full((3,), 2.0))


def test_accumulate_adds_and_squares():
    arguments = accumulate_arguments()
    wanted = [
        problem.double(s) + 0.5 * problem.double(g) for s, g in zip(arguments["sums"], arguments["grads"], strict=True)
    ]
    torch.ops.pybatch.accumulate(**arguments)
    for s, w in zip(arguments["sums"], wanted, strict=True):
        torch.testing.assert_close(s.double(), torch.from_numpy(w), rtol=1e-6, atol=1e-6)
    ledger = ops.Ledger.of(arguments["ledger"], arguments["ring"])
    squares = sum(float((g.double() ** 2).sum()) for g in arguments["grads"])
    assert float(ledger["micro_sq"]) == pytest.approx(4.0 * squares, rel=1e-6)
    assert float(ledger["sum_sq"]) == pytest.approx(problem.global_norm(wanted) ** 2, rel=1e-6)


def test_fake_tensors_know_them():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert torch.ops.pybatch.step(**step_arguments()) is None


def test_a_gradient_of_another_layout_is_refused():
    arguments = accumulate_arguments()
    arguments["grads"][1] = torch.ones(3, 3).t()[:, :3].t().t()
    with pytest.raises(UsageError, match=r"tensor 1 of shape \(3, 3\)"):
        torch.ops.pybatch.accumulate(**arguments)


def test_an_optimizer_steps_beside_a_compiled_model():
    """`step` stays outside Dynamo: the same bits as without compiling."""
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Linear(4, 2)
        opt = optim.AdamW(net.parameters(), lr=LR, max_grad_norm=0.1)

        def train(x, net=net, opt=opt):
            loss = (net(x) ** 2).mean()
            loss.backward()
            opt.step()
            opt.zero_grad()

        run = torch.compile(train, backend="eager") if compiled else train
        for i in range(3):
            run(torch.full((3, 4), float(i + 1)))
        ends.append([p.detach() for p in net.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


STEP_MISFITS = {
    "a short state": lambda a: a["states"].__setitem__(0, torch.zeros(1, 3)),
    "a state of another dtype": lambda a: a["states"].__setitem__(0, a["states"][0].double()),
    "a state too few": lambda a: a["states"].pop(),
    "no master": lambda a: a["masters"].__setitem__(0, torch.empty(0)),
    "a master of another dtype": lambda a: a["masters"].__setitem__(0, a["masters"][0].bfloat16()),
    "a row of no group": lambda a: a["rows"].__setitem__(0, 1),
    "no rule": lambda a: a["rules"].__setitem__(0, 99),
    "another dtype's storage": lambda a: a["storages"].__setitem__(0, ops.STORAGES["float32"]),
    "a step too few": lambda a: a.update(steps=torch.zeros(2)),
    "a short ledger": lambda a: a.update(ledger=a["ledger"][:4]),
    "hyper of another width": lambda a: a.update(hyper=a["hyper"][:, :3]),
    "a float64 gradient": lambda a: a["grads"].__setitem__(0, a["grads"][0].double()),
    "a gradient too few": lambda a: a["grads"].pop(),
}


@pytest.mark.parametrize("misfit", STEP_MISFITS.values(), ids=STEP_MISFITS.keys())
def test_a_step_refuses_what_would_be_written_past_its_end(misfit):
    arguments = step_arguments("bfloat16_master")
    misfit(arguments)
    before = [p.clone() for p in arguments["params"]]
    with pytest.raises(UsageError):
        torch.ops.pybatch.step(**arguments)
    assert all(torch.equal(p, q) for p, q in zip(arguments["params"], before, strict=True))


@pytest.mark.parametrize("name", ["sums", "ledger"])
def test_an_accumulation_refuses_what_would_be_written_past_its_end(name):
    arguments = accumulate_arguments()
    if name == "sums":
        arguments["sums"][0] = arguments["sums"][0].bfloat16()
    else:
        arguments["ledger"] = arguments["ledger"][:4]
    with pytest.raises(UsageError):
        torch.ops.pybatch.accumulate(**arguments)
