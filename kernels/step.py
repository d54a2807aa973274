"""Triton twin of step.cu: the norm of the gradients, then load -> rule -> store, over a list of tensors.

Four small launches where CUDA C++ needs two: the sums and the bookkeeping have a program of their own, because Triton
gives no ordering between the programs of one launch.
"""

from typing import Any

import triton
import triton.language as tl
from pybatch.kernels import adamw, sgd
from pybatch.kernels.ledger import collect_kernel, judge, settle_kernel
from pybatch.kernels.table import (
    ADAMW,
    ADAMW_AMSGRAD,
    CODE,
    COLUMNS,
    DTYPES,
    GRAD,
    GROUP,
    HYPER_COLUMNS,
    HYPER_OWN,
    LAUNCH,
    MAXIMIZE,
    NUMEL,
    PARAM,
    SGD_MOMENTUM,
    STATE0,
    SUM,
    load_as_f32,
    load_f32,
    store_f32,
    store_from_f32,
    sum_squares,
)

adamw_make, adamw_update = adamw.make, adamw.update
sgd_make, sgd_update = sgd.make, sgd.update


@triton.jit
def norm_kernel(rows, chunks, partials, block: tl.constexpr):
    """One program a chunk: the sum of squares of its gradient."""
    chunk = tl.program_id(0).to(tl.int64)
    row = rows + tl.load(chunks + 2 * chunk) * COLUMNS
    offset = tl.load(chunks + 2 * chunk + 1) * block + tl.arange(0, block)
    value = tl.zeros((), tl.float64)
    grad = tl.load(row + GRAD)
    if grad != 0:
        value = sum_squares(load_as_f32(grad, tl.load(row + CODE) % DTYPES, offset, offset < tl.load(row + NUMEL)))
    tl.store(partials + 2 * chunk, 0.0)
    tl.store(partials + 2 * chunk + 1, value)


@triton.jit
def update_kernel(
    rows,
    chunks,
    hyper,
    steps,
    ledger,
    inverse: tl.float64,
    max_norm: tl.float64,
    grad_scale: tl.int64,
    found_inf: tl.int64,
    accumulated: tl.constexpr,
    taken: tl.constexpr,
    clip: tl.constexpr,
    block: tl.constexpr,
):
    """One program a chunk: the whole update of its elements."""
    chunk = tl.program_id(0).to(tl.int64)
    index = tl.load(chunks + 2 * chunk)
    row = rows + index * COLUMNS
    offset = tl.load(chunks + 2 * chunk + 1) * block + tl.arange(0, block)
    mask = offset < tl.load(row + NUMEL)
    source = tl.load(row + (SUM if accumulated else GRAD))
    skip, _norm, coefficient, unscaled = judge(ledger, inverse, max_norm, grad_scale, found_inf, taken, clip)
    if (source != 0) & (skip == 0):
        code = tl.load(row + CODE)
        dtype, rule = code % DTYPES, code // DTYPES
        group = hyper + tl.load(row + GROUP) * HYPER_COLUMNS
        step = tl.load(steps + index).to(tl.float64) + 1.0
        factor = unscaled * coefficient
        factor = tl.where(tl.load(group + MAXIMIZE) != 0.0, -factor, factor).to(tl.float32)
        if accumulated:
            g = load_f32(source, offset, mask) * factor
        else:
            g = load_as_f32(source, dtype, offset, mask) * factor
        param = tl.load(row + PARAM)
        p = load_as_f32(param, dtype, offset, mask)
        a0, a1, a2 = tl.load(row + STATE0), tl.load(row + STATE0 + 1), tl.load(row + STATE0 + 2)
        if rule >= ADAMW:
            adam = adamw_make(group, step, HYPER_OWN)
            m, v = load_f32(a0, offset, mask), load_f32(a1, offset, mask)
            if rule == ADAMW_AMSGRAD:
                p, m, v, peak = adamw_update(adam, p, g, m, v, load_f32(a2, offset, mask), True)
                store_f32(a2, offset, peak, mask)
            else:
                p, m, v, _unused = adamw_update(adam, p, g, m, v, v, False)
            store_f32(a0, offset, m, mask)
            store_f32(a1, offset, v, mask)
        else:
            plain = sgd_make(group, step, HYPER_OWN)
            if rule == SGD_MOMENTUM:
                p, b = sgd_update(plain, p, g, load_f32(a0, offset, mask), True)
                store_f32(a0, offset, b, mask)
            else:
                p, _same = sgd_update(plain, p, g, g, False)
        store_from_f32(param, dtype, offset, p, mask)


def step(tensors: Any, call: Any) -> None:
    """One update of a `pybatch.ops.TensorList`."""
    count, block = len(tensors.chunks), tensors.table.chunk
    ledger = tensors.ledger.values
    if call.norm:
        if count:
            norm_kernel[(count,)](tensors.rows, tensors.chunks, tensors.partials, block=block, **LAUNCH)
        collect_kernel[(1,)](tensors.partials, ledger, count, 0.0, micro=False, block=1024, **LAUNCH)
    decision = {
        "inverse": call.inverse,
        "max_norm": call.max_norm,
        "grad_scale": call.grad_scale,
        "found_inf": call.found_inf,
        "taken": call.norm or call.known,
        "clip": call.clip,
    }
    if count:
        update_kernel[(count,)](
            tensors.rows,
            tensors.chunks,
            tensors.hyper,
            tensors.steps,
            ledger,
            accumulated=call.sum,
            block=block,
            **decision,
            **LAUNCH,
        )
    settle_kernel[(1,)](
        tensors.rows,
        tensors.table.row_count,
        SUM.value if call.sum else GRAD.value,
        tensors.steps,
        ledger,
        tensors.ledger.ring,
        examples=call.examples,
        micro_batches=call.micro_batches,
        noise=call.noise,
        block=1024,
        **decision,
        **LAUNCH,
    )
