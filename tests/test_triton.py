"""The Triton twin on CPU tensors, in Triton's interpreter, against the same float64 reference.

The interpreter must be chosen before Triton is imported, so the checks run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent

REFERENCE = """
import torch
from cases import adamw, problem, sgd

for case in (adamw, sgd):
    for i, options in enumerate(case.VARIANTS):
        for dtype in problem.DTYPES if i == 0 else (torch.float32,):
            clip = 5.0 if i % 2 else None
            params = problem.tensors(dtype, small=True)
            opt = case.optimizer(params, lr=case.LR, max_grad_norm=clip, backend="triton", **options)
            result = problem.follow(
                params, options, case.reference, case.LR, 3, clip, optimizer=opt, stored=problem.truncated
            )
            problem.assert_follows(result, dtype)
        if i == 0:  # tensors of several chunks
            params = problem.tensors(backend="triton")
            opt = case.optimizer(params, lr=case.LR, max_grad_norm=5.0, backend="triton", **options)
            result = problem.follow(params, options, case.reference, case.LR, 3, 5.0, optimizer=opt)
            problem.assert_follows(result, torch.float32)
    for wrong, options in case.WRONG:
        params = problem.tensors(small=True)
        opt = case.optimizer(params, lr=case.LR, backend="triton", **options)
        result = problem.follow(params, options, wrong, case.LR, steps=3, optimizer=opt)
        try:
            problem.assert_follows(result, torch.float32)
        except AssertionError:
            continue
        raise SystemExit(f"{wrong.__name__} passed")
"""

SAME_AS_CPP = """
import torch
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

for case in (adamw, sgd):
    for dtype in (torch.float32, torch.bfloat16):
        (a, first), (b, second) = run(case, "cpp", dtype, 4), run(case, "triton", dtype, 4)
        assert first.skipped == second.skipped == 1
        unit = torch.finfo(dtype).eps * 8
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(p, q, rtol=unit, atol=unit)
        own, twin = first.state_dict()["pybatch"], second.state_dict()["pybatch"]
        torch.testing.assert_close(own["ledger"], twin["ledger"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own["ring"], twin["ring"], rtol=1e-4, atol=1e-3)
"""

FOLD = """
import torch
from pybatch.optim import SGD

rings = []
for backend in ("cpp", "triton"):
    p = torch.nn.Parameter(torch.zeros(3))
    opt = SGD([p], lr=0.0, noise=True, backend=backend)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        p.grad = torch.randn(3, generator=generator)
        opt.accumulate(2)
    opt.step()
    ring = opt._ledger.ring  # filled by hand: 256 steps of the interpreter take a minute
    ring.copy_(torch.randn(ring.shape, generator=generator, dtype=torch.float64))
    opt._ledger.values[9] = 256.0
    for _ in range(2):
        p.grad = torch.randn(3, generator=generator)
        opt.accumulate(2)
    opt.step()
    rings.append((ring.clone(), opt._ledger["ring_length"], opt._ledger["ring_steps"]))
for a, b in zip(*rings, strict=True):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
assert float(rings[0][1]) == 2.0
"""


@pytest.mark.parametrize("program", [REFERENCE, SAME_AS_CPP, FOLD], ids=["reference", "same-as-cpp", "fold"])
def test_in_the_interpreter(program):
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pybatch.kernels import accumulate, ledger, step, table

POINTERS = {"rows": "*i64", "chunks": "*i64", "partials": "*fp64", "hyper": "*fp64", "steps": "*fp32",
            "ledger": "*fp64", "ring": "*fp64"}

def build(kernel, **constants):
    types = {p.name: "constexpr" if p.name in constants else POINTERS.get(p.name) or p.annotation_type or "i32"
             for p in kernel.params}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    done = compile(source, target=GPUTarget("cuda", 90, 32), options=dict(table.LAUNCH))
    assert done.asm["cubin"]
    return done

build(step.norm_kernel, block=1024)
build(step.update_kernel, block=1024, accumulated=True, taken=True, clip=True)
build(accumulate.accumulate_kernel, block=1024)
build(ledger.collect_kernel, block=1024, micro=True)
settle = build(ledger.settle_kernel, block=1024, source=1, taken=True, clip=True, noise=True)
# Outside every branch: no warp reads the ring's count of steps after one thread has counted on, nor sums set to 0.
level = [line for line in settle.asm["ttgir"].splitlines() if line.startswith("    ") and line[4] != " "]
assert sum("barrier" in line for line in level) == 2, level
"""


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


def test_constants_are_the_compiled_modules():
    from pybatch.kernels import table

    from pybatch import _C

    for name, value in _C.columns.items():
        assert getattr(table, name.upper()).value == value
    for name, value in _C.ledger.items():
        assert getattr(table, name.upper()).value == value
    for name, value in _C.dtypes.items():
        assert getattr(table, name.upper()).value == value
    assert (table.COLUMNS.value, table.DTYPES.value) == (_C.column_count, _C.dtype_count)
    assert (table.RING_ROWS.value, table.HYPER_COLUMNS.value) == (_C.ring_rows, _C.hyper_columns)
    numbers = {"Sgd": table.SGD, "SgdMomentum": table.SGD_MOMENTUM, "AdamW": table.ADAMW}
    numbers["AdamWAmsgrad"] = table.ADAMW_AMSGRAD
    assert {name: number for name, (number, _) in _C.rules.items()} == {k: v.value for k, v in numbers.items()}
