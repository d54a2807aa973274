"""Every optimizer on Triton's twin, in Triton's interpreter, over the tables in tests/cases."""

import pytest
from cases import interpreter

pytest.importorskip("triton")

REFERENCE = """
import torch
from cases import problem
from cases.catalogue import EXACT, whole

def check(case, update, options, dtype=torch.float32, clip=None, backend="triton"):
    params = problem.tensors(dtype, small=True)[:9:2]
    opt = case.optimizer(params, lr=case.LR, max_grad_norm=clip, backend=backend, **options)
    result = problem.follow(params, options, update, case.LR, 2, clip, optimizer=opt)
    problem.assert_follows(result, dtype)

for case in EXACT:  # what options do to a rule is the same code for every backend
    check(case, case.reference, case.VARIANTS[-1], clip=5.0)
    check(case, case.reference, whole(case), torch.bfloat16)
    for wrong, options in case.WRONG:  # these tensors and steps show it, whatever backend takes them
        try:
            check(case, wrong, options, backend="cpp")
        except AssertionError:
            continue
        raise SystemExit(f"{case.__name__}: {wrong.__name__} passed")
"""

SAME_AS_CPP = """
import torch
from cases import problem
from cases.catalogue import OPTIMIZERS, whole

# Every rule and every storage has been met alone; here each storage meets four optimizers at least, each of them two.
KINDS = ({}, {"master_weights": True}, {"master_weights": "remainder"}, {"stochastic_rounding": 3})
for i, case in enumerate(OPTIMIZERS):
    for kind in (KINDS[i % len(KINDS)], KINDS[(i + 1 + i // len(KINDS)) % len(KINDS)]):
        runs = []
        for backend in ("cpp", "triton"):
            params = problem.tensors(torch.bfloat16, small=True)[:9:2]
            opt = case.optimizer(params, lr=case.LR, max_grad_norm=5.0, backend=backend, **whole(case), **kind)
            problem.train(opt, params, 2)
            runs.append([opt.state[p].get("master", p) for p in params])
        for a, b in zip(*runs, strict=True):  # 16 bits may fall to the neighbour
            unit = 1e-5 if kind == {"master_weights": True} else 2.0**-7
            torch.testing.assert_close(b.float(), a.float(), rtol=unit, atol=unit)
"""


PROGRAMS = {"reference": REFERENCE, "same as cpp": SAME_AS_CPP}


@pytest.fixture(scope="module")
def failures():
    return interpreter.run(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_in_the_interpreter(failures, name):
    assert not failures[name]
