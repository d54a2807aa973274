"""The Triton twin on CPU tensors, in Triton's interpreter, against the C++ core, which the float64 references check."""

import pytest
from cases import interpreter

pytest.importorskip("triton")


LISTS = """
import math, torch
from cases import lists
from cases.agreement import assert_same
from pybatch import _C, ops

class Triton(ops.TritonBackend):
    chunk = 64  # two blocks of a chunk's loops

# By vectors and a tail, element by element over two chunks (odd ones are not aligned), none, one, a whole chunk.
COUNTS = [33, 64 + 33, 0, 1, 64]

def make(backend, rule, storage=None, layered=False):
    dtype = getattr(torch, (storage or "float32").split("_")[0])
    layers = torch.zeros(len(COUNTS), ops.LAYER_SIZE, dtype=torch.float64) if layered else None
    return lists.Setup(lists.draw(COUNTS, dtype, seed=5), rule, storage, layers=layers, backend=backend)

def both(*args, **more):
    return make(ops.CppBackend(), *args, **more), make(Triton(), *args, **more)
"""

RULES = """
for rule in ops.RULES:
    own, twin = both(rule)
    for setup in (own, twin):
        grads = lists.draw(COUNTS, torch.bfloat16, seed=1)
        grads[3] = None
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
                    grads[5 - 2 * i] = None
                if step == 1 and i == 1:
                    grads[4][7] = math.inf
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

COUNTS[:] = [1, 0, 3, 0, 64 + 33]
for name in extremes.NAMES:
    found = [extremes.check(setup, name, accumulated=of) for of in (False, True) for setup in both("Sgd")]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(found[:1] * 4), rtol=1e-6, atol=0.0, equal_nan=True)
"""

NARROW = """
from cases.agreement import assert_same_but_for_codes

class Wide(ops.TritonBackend):
    chunk = 2 * ops.STATE_BLOCK

counts = [Wide.chunk + 300, 0, 1, 255]
NARROWED = {"SgdMomentum": ["bf16"], "AdamW": ["8bit"], "NAdam": ["bf16"], "Adan": ["8bit"], "Lamb": ["bf16", "8bit"]}
for rule, state_types in NARROWED.items():  # states are stored alike, however many
    for state_type in state_types:
        setups = [lists.Setup(lists.draw(counts, seed=5), rule, state_type=state_type, backend=backend)
                  for backend in (ops.CppBackend(), Wide())]
        for setup in setups:
            for seed in (1, 2):
                setup.step(lists.draw(counts, seed=seed), norm=True, clip=True, max_norm=9.0)
        assert_same_but_for_codes(*setups)
        assert all(s.any() for of in setups[1].states for s in of if len(s))
"""

UNSCALE = """
from cases import agreement

for rule, dtypes in {"Sgd": ops.DTYPES, "Lars": [torch.float16], "Lamb": [torch.bfloat16]}.items():
    for dtype in dtypes:
        own, twin = both(rule)
        for setup in (own, twin):
            lists.unscale(setup, dtype)
        agreement.assert_same(own, twin)
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
    "narrow states": NARROW,
    "unscale": UNSCALE,
    "same as cpp": SAME_AS_CPP,
}


@pytest.fixture(scope="module")
def failures():
    return interpreter.run({name: LISTS + program for name, program in PROGRAMS.items()})


@pytest.mark.parametrize("name", PROGRAMS)
def test_in_the_interpreter(failures, name):
    assert not failures[name]


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
