"""The Triton twin on CPU tensors, in Triton's interpreter, against the C++ core, which the float64 references check."""

import os
import subprocess
import sys

import pytest
from cases import interpreter

pytest.importorskip("triton")


LISTS = """
import math, torch
from cases import lists
from pybatch import _C, ops

class Triton(ops.TritonBackend):
    chunk = 64

COUNTS = [5, 0, 1, 63, 64, 65, 64 * 3 + 33]

def make(backend, rule, storage=None, layered=False):
    dtype = getattr(torch, (storage or "float32").split("_")[0])
    layers = torch.zeros(len(COUNTS), ops.LAYER_SIZE, dtype=torch.float64) if layered else None
    return lists.Setup(lists.draw(COUNTS, dtype, seed=5), rule, storage, layers=layers, backend=backend)

def both(*args, **more):
    return make(ops.CppBackend(), *args, **more), make(Triton(), *args, **more)

def assert_same(own, twin, storage=None):
    \"\"\"Equal but for fp32 arithmetic in another order, which can move a 16-bit value to its neighbour.\"\"\"
    unit = torch.finfo(own.params[0].dtype).eps if storage else 0.0
    for a, b in zip(own.params, twin.params, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-5 + unit, atol=1e-5)
        assert a.dtype == torch.float32 or (a != b).double().sum() <= 1
    for a, b in zip(own.values(), twin.values(), strict=True):
        torch.testing.assert_close(b, a, rtol=2e-5 + unit, atol=1e-5)
    for a, b in zip(sum(own.states, ()), sum(twin.states, ()), strict=True):
        torch.testing.assert_close(b, a, rtol=2e-5 + unit, atol=1e-5 + unit)
    assert torch.equal(own.list.steps, twin.list.steps)
    torch.testing.assert_close(twin.ledger.values, own.ledger.values, rtol=1e-5, atol=1e-5, equal_nan=True)
    if ops.RULES[own.rule].norms != "none":
        torch.testing.assert_close(twin.list.norms, own.list.norms, rtol=1e-4, atol=1e-5)
"""

RULES = """
for rule in ops.RULES:
    own, twin = both(rule)
    for setup in (own, twin):
        grads = lists.draw(COUNTS, torch.bfloat16, seed=1)
        grads[2] = None
        setup.step(grads, norm=True, clip=True, max_norm=3.0)
        setup.step(lists.draw(COUNTS, seed=2), lambda tensors: None, norm=True)
    assert_same(own, twin)
"""

ZEROED = """
for rule in ops.RULES:
    own, twin = (lists.infinities(setup) for setup in both(rule))
    torch.testing.assert_close(twin, own, rtol=2e-5, atol=1e-5, equal_nan=True)
"""

STORAGES = """
for storage in ops.STORAGES:
    for rule in ("MuonMove", "Lars"):  # without and with a norm of what was stored
        own, twin = both(rule, storage)
        for setup in (own, twin):
            for seed in (1, 2):
                setup.step(lists.draw(COUNTS, seed=seed), norm=True)
        assert_same(own, twin, storage)
    if storage.endswith("_stochastic"):
        own, twin = both("MuonMove", storage)
        for setup in (own, twin):
            setup.set_hyper(torch.finfo(setup.params[0].dtype).eps / 4, weight_decay=0.0, adjustment=1.0)
            for p in setup.params:
                p.fill_(1.0)
            setup.step([torch.ones(n) for n in COUNTS])
        assert all(torch.equal(a, b) for a, b in zip(own.params, twin.params, strict=True))
        assert 0 < (torch.cat(own.params) != 1.0).double().mean() < 1
"""

ACCUMULATE = """
for rule in ("Lars", "Lamb"):
    setups = both(rule, layered=True)
    for step in range(3):
        for setup in setups:
            if step == 2:  # as if full
                generator = torch.Generator().manual_seed(0)
                setup.layers[:, ops.LAYER_SUMS :].copy_(torch.randn(len(COUNTS), 96, generator=generator))
                setup.ledger.ring.copy_(torch.randn(256, 3, generator=generator))
                setup.ledger.values[_C.ledger["ring_steps"]] = 256.0
            for i in range(3):
                grads = lists.draw(COUNTS, torch.bfloat16 if step else torch.float32, seed=9 * step + i)
                if i:
                    grads[4 - i] = None
                if step == 1 and i == 1:
                    grads[5][7] = math.inf
                setup.accumulate(grads, 4.0, first=not i, weight=1.0 + i)
            setup.step([None] * len(COUNTS), sum=True, known=True, noise=True, clip=True, max_norm=9.0,
                       inverse=1 / 6, examples=12.0, micro_batches=3.0)
    assert float(setups[0].ledger["skipped"]) == 1.0 and float(setups[1].ledger["ring_length"]) == 2.0
    assert_same(*setups)
    torch.testing.assert_close(setups[1].layers, setups[0].layers, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(setups[1].ledger.ring, setups[0].ledger.ring, rtol=1e-4, atol=1e-2)
    for setup in setups:  # a second pass on the same ledger
        setup.ledger.values[_C.ledger["skip"]] = 0.0
        setup.step(lists.draw(COUNTS, seed=1), follow=True, clip=True, max_norm=1e-9)
    if rule == "Lamb":
        assert_same(*setups)
"""

EXTREMES = """
from cases import extremes

for name in extremes.NAMES:
    found = [extremes.check(setup, name, accumulated=of) for of in (False, True) for setup in both("Sgd")]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(found[:1] * 4), rtol=1e-6, atol=0.0, equal_nan=True)
"""

SAME_AS_CPP = """
from cases import adamw, problem, sgd

def run(case, backend, dtype, steps):
    small = dtype != torch.float32 or case is not sgd  # the other has tensors of several chunks
    params = problem.tensors(dtype, small=small, backend="triton")
    opt = case.optimizer(params, lr=0.01, max_grad_norm=5.0, noise=True, backend=backend)
    opt.grad_scale = torch.tensor(4.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for n in (3, 8, 5):
            problem.give_gradients(params, generator)
            if n == 8:
                params[4].grad = None
            if step == 1 and n == 8:
                params[0].grad[0] = float("inf")
            opt.accumulate(n)
        opt.step()
    return params, opt

for case, dtype in ((adamw, torch.bfloat16), (sgd, torch.float32)):
    (a, first), (b, second) = run(case, "cpp", dtype, 3), run(case, "triton", dtype, 3)
    assert first.skipped == second.skipped == 1
    unit = torch.finfo(dtype).eps * 8
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=unit, atol=unit)
    own, twin = first._ledger, second._ledger
    torch.testing.assert_close(own.values, twin.values, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(own.ring, twin.ring, rtol=1e-4, atol=1e-3)
"""


PROGRAMS = {
    "rules": RULES,
    "zeroed": ZEROED,
    "storages": STORAGES,
    "accumulate": ACCUMULATE,
    "extremes": EXTREMES,
    "same as cpp": SAME_AS_CPP,
}


@pytest.fixture(scope="module")
def failures():
    return interpreter.run({name: LISTS + program for name, program in PROGRAMS.items()})


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_in_the_interpreter(failures, name):
    assert not failures[name]


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pybatch.kernels import accumulate, ledger, rules, step, table

POINTERS = {"rows": "*i64", "chunks": "*i64", "starts": "*i64", "steps": "*fp32", "scalars": "*fp32"} | dict.fromkeys(
    ["partials", "hyper", "ledger", "ring", "share", "norms", "carried", "layers"], "*fp64")

def build(kernel, **constants):
    types = {p.name: "constexpr" if p.name in constants else POINTERS.get(p.name) or p.annotation_type or "i32"
             for p in kernel.params}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    done = compile(source, target=GPUTarget("cuda", 90, 32), options=dict(table.LAUNCH))
    assert done.asm["cubin"]
    return done

decision = {"taken": True, "clip": True, "follow": False}
lars, lamb = rules.with_norms("gradient", rules.RULES), rules.with_norms("direction", rules.RULES)
build(step.norm_kernel, block=256, carriers=lars, accumulated=False, gradients=True)
build(step.prepare_kernel, block=256, rules=rules.selection(lamb), accumulated=False, **decision)
every = {"rules": rules.selection(rules.RULES), "prepared": lamb, "carriers": lars}
build(step.update_kernel, block=256, accumulated=False, **every, **decision)
move = {"rules": rules.selection([10]), "prepared": (), "carriers": ()}
build(step.update_kernel, block=256, accumulated=True, taken=False, clip=False, follow=True, **move)
build(accumulate.accumulate_kernel, block=1024)
build(ledger.collect_kernel, block=1024, micro=True)
rows = {"block": 64, "source": 1, "layered": True}
build(ledger.collect_rows_kernel, carriers=lars, prepared=(), gradients=True, micro=True, **rows)
build(ledger.collect_rows_kernel, carriers=(), prepared=lamb, gradients=False, micro=False, **rows)
keepers = rules.selection(rules.with_scalar(rules.RULES))
build(ledger.settle_rows_kernel, carriers=lars, keepers=keepers, noise=True, **rows, **decision)
settle = build(ledger.settle_kernel, taken=True, clip=True, noise=True)
# Outside every branch: no warp reads the ring's count of steps after one thread has counted on, nor sums set to 0.
level = [line for line in settle.asm["ttgir"].splitlines() if line.startswith("    ") and line[4] != " "]
assert sum("barrier" in line for line in level) == 2, level
"""


@pytest.mark.slow(seconds=15)
def test_every_kernel_compiles_for_a_gpu(tmp_path):
    """The interpreter accepts programs the compiler does not, such as variables that change their type in a branch."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_rule_has_a_twin():
    from pybatch.kernels.rules import RULES, TWINS

    from pybatch import ops

    assert {number: rule.name for number, rule in RULES.items()} == {of.number: name for name, of in ops.RULES.items()}
    assert len(TWINS) == len(RULES)
    for rule in TWINS:
        compiled = ops.RULES[rule.name]
        both = (rule.prepare, rule.direction)
        assert [function is not None for function in both] == [compiled.norms == "direction"] * 2
        assert (rule.next_scalar is not None) == (compiled.scalar is not None)


def test_constants_of_rules_are_what_every_triton_takes():
    """Triton 3.6 finds no type for a None or a text in a tuple; 3.9 does."""
    from pybatch.kernels.rules import RULES, selection
    from triton import JITFunction

    chosen = selection(RULES)
    assert all(isinstance(value, int | JITFunction) for rule in chosen for value in rule)
    assert len({rule[-1] for rule in chosen}) == len(RULES)  # each has a key of its own
