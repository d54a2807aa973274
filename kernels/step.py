"""Triton twin of step.cu: norms, then load -> rule -> store, over a list of tensors.

A phase is one launch over the list, and small ones for the sums and the bookkeeping, which CUDA C++ leaves to the block
that finishes last: Triton gives no ordering between the programs of one launch.
"""

from typing import Any

import triton
import triton.language as tl
from pybatch.kernels.ledger import collect_kernel, collect_rows_kernel, judge, settle_kernel, settle_rows_kernel
from pybatch.kernels.rules import (
    CARRIED,
    DIRECTION,
    MAKE,
    NUMBER,
    PREPARE,
    PREPARED,
    STATES,
    UPDATE,
    selection,
    with_norms,
    with_scalar,
)
from pybatch.kernels.storage import load_param, random_bits, store_param
from pybatch.kernels.table import (
    BFLOAT16_STOCHASTIC,
    CODE,
    DIRECTION_SQ,
    FLOAT16_STOCHASTIC,
    GRAD,
    GRAD_TYPE,
    GROUP,
    HYPER_COLUMNS,
    LAUNCH,
    MAXIMIZE,
    PARAM_SQ,
    ROW_NORMS,
    SALT,
    STATE,
    STORAGES,
    SUM,
    contains,
    load_as_f32,
    load_f32,
    locate,
    store_f32,
    sum_squares,
)


@triton.jit
def load_gradient(row, offset, mask, accumulated: tl.constexpr):
    """The gradient a step takes: the fp32 sum, or the gradient in its own dtype."""
    if accumulated:
        g = load_f32(tl.load(row + SUM), offset, mask)
    else:
        g = load_as_f32(tl.load(row + GRAD), tl.load(row + GRAD_TYPE), offset, mask)
    return g


@triton.jit
def load_states(row, offset, mask, count: tl.constexpr):
    """A tuple of blocks."""
    s = ()
    for k in tl.static_range(count):
        s = s + (load_f32(tl.load(row + STATE + k), offset, mask),)  # noqa: RUF005  Triton knows no star
    return s


@triton.jit
def store_states(row, offset, mask, s, count: tl.constexpr):
    """Write them back."""
    for k in tl.static_range(count):
        store_f32(tl.load(row + STATE + k), offset, s[k], mask)


@triton.jit
def norm_kernel(
    rows,
    chunks,
    partials,
    carried,
    carriers: tl.constexpr,
    accumulated: tl.constexpr,
    gradients: tl.constexpr,
    block: tl.constexpr,
):
    """One program a chunk: the sums of squares of its parameter (rules in `carriers`) and of its gradient."""
    chunk, index, row, offset, mask = locate(rows, chunks, block)
    param, gradient = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    if tl.load(row + (SUM if accumulated else GRAD)) != 0:
        if gradients:
            gradient = sum_squares(load_gradient(row, offset, mask, accumulated))
        code = tl.load(row + CODE)
        held = tl.load(carried + index)
        if contains(carriers, code // STORAGES) & (held != held):
            param = sum_squares(load_param(row, code % STORAGES, offset, mask))
    tl.store(partials + 2 * chunk, param)
    tl.store(partials + 2 * chunk + 1, gradient)


@triton.jit
def prepare_kernel(
    rows,
    chunks,
    hyper,
    steps,
    scalars,
    partials,
    ledger,
    inverse: tl.float64,
    max_norm: tl.float64,
    grad_scale: tl.int64,
    found_inf: tl.int64,
    rules: tl.constexpr,
    accumulated: tl.constexpr,
    taken: tl.constexpr,
    clip: tl.constexpr,
    follow: tl.constexpr,
    block: tl.constexpr,
):
    """One program a chunk: the states, and the sums of squares of parameter and direction."""
    chunk, index, row, offset, mask = locate(rows, chunks, block)
    skip, _norm, coefficient, unscaled = judge(ledger, inverse, max_norm, grad_scale, found_inf, taken, clip, follow)
    if (tl.load(row + (SUM if accumulated else GRAD)) != 0) & (skip == 0):
        code = tl.load(row + CODE)
        group = hyper + tl.load(row + GROUP) * HYPER_COLUMNS
        step = tl.load(steps + index).to(tl.float64) + 1.0
        factor = tl.where(tl.load(group + MAXIMIZE) != 0.0, -unscaled, unscaled) * coefficient
        for i in tl.static_range(len(rules)):
            if code // STORAGES == rules[i][NUMBER]:
                held = tl.load(scalars + index).to(tl.float64)
                made = rules[i][MAKE](group, step, held, factor * 0.0, factor * 0.0)
                p = load_param(row, code % STORAGES, offset, mask)
                g = load_gradient(row, offset, mask, accumulated) * factor.to(tl.float32)
                s = rules[i][PREPARE](made, g, load_states(row, offset, mask, rules[i][STATES]))
                store_states(row, offset, mask, s, rules[i][STATES])
                direction = rules[i][DIRECTION](made, p, s)
                tl.store(partials + 2 * chunk, sum_squares(p))
                tl.store(partials + 2 * chunk + 1, sum_squares(tl.where(mask, direction, 0.0)))


@triton.jit
def update_kernel(
    rows,
    chunks,
    hyper,
    steps,
    scalars,
    norms,
    partials,
    ledger,
    inverse: tl.float64,
    max_norm: tl.float64,
    grad_scale: tl.int64,
    found_inf: tl.int64,
    seed_low: tl.int64,
    seed_high: tl.int64,
    rules: tl.constexpr,
    prepared: tl.constexpr,
    carriers: tl.constexpr,
    accumulated: tl.constexpr,
    taken: tl.constexpr,
    clip: tl.constexpr,
    follow: tl.constexpr,
    block: tl.constexpr,
):
    """One program a chunk: the whole update of its elements."""
    chunk, index, row, offset, mask = locate(rows, chunks, block)
    skip, _norm, coefficient, unscaled = judge(ledger, inverse, max_norm, grad_scale, found_inf, taken, clip, follow)
    if (tl.load(row + (SUM if accumulated else GRAD)) != 0) & (skip == 0):
        code = tl.load(row + CODE)
        storage = code % STORAGES
        group = hyper + tl.load(row + GROUP) * HYPER_COLUMNS
        step = tl.load(steps + index).to(tl.float64) + 1.0
        factor = tl.where(tl.load(group + MAXIMIZE) != 0.0, -unscaled, unscaled) * coefficient
        own = norms + index * ROW_NORMS
        param_sq, direction_sq = tl.load(own + PARAM_SQ), tl.load(own + DIRECTION_SQ)
        random = tl.zeros((block,), tl.uint32)
        if (storage == BFLOAT16_STOCHASTIC) | (storage == FLOAT16_STOCHASTIC):
            low, high = tl.full((), seed_low, tl.int64), tl.full((), seed_high, tl.int64)
            random = random_bits(low, high, tl.load(row + SALT), step.to(tl.int64), offset)
        p = load_param(row, storage, offset, mask)
        g = p
        if not contains(prepared, code // STORAGES):  # else the states are final and no gradient is needed
            g = load_gradient(row, offset, mask, accumulated) * factor.to(tl.float32)
        for i in tl.static_range(len(rules)):
            if code // STORAGES == rules[i][NUMBER]:
                if rules[i][CARRIED]:  # the norm of the gradient as this rule sees it
                    direction_sq = direction_sq * factor * factor
                made = rules[i][MAKE](group, step, tl.load(scalars + index).to(tl.float64), param_sq, direction_sq)
                p, s = rules[i][UPDATE](made, p, g, load_states(row, offset, mask, rules[i][STATES]))
                if not rules[i][PREPARED]:
                    store_states(row, offset, mask, s, rules[i][STATES])
        store_param(row, storage, offset, p, mask, random)
        if contains(carriers, code // STORAGES):
            tl.debug_barrier()  # the parameter is read again as it was stored
            tl.store(partials + 2 * chunk, sum_squares(load_param(row, storage, offset, mask)))


def _source(call: Any) -> int:
    return int(SUM.value if call.sum else GRAD.value)


def _decision(call: Any) -> dict[str, Any]:
    """The arguments of `judge`."""
    return {
        "inverse": call.inverse,
        "max_norm": call.max_norm,
        "grad_scale": call.grad_scale,
        "found_inf": call.found_inf,
        "taken": call.norm or call.known,
        "clip": call.clip,
        "follow": call.follow,
    }


def collect_rows(tensors: Any, source: int, examples: float = 0.0, **how: Any) -> None:
    """Launch `collect_rows_kernel`."""
    how = {"carriers": (), "prepared": (), "gradients": False, "micro": False} | how
    collect_rows_kernel[(tensors.table.row_count,)](
        tensors.rows,
        tensors.starts,
        tensors.share,
        tensors.norms,
        tensors.carried,
        tensors.partials if tensors.layers is None else tensors.layers,
        tensors.partials,
        examples,
        source=source,
        layered=tensors.layers is not None,
        block=64,
        **how,
        **LAUNCH,
    )


def norm(tensors: Any, call: Any) -> None:
    """The norm phase of a `pybatch.ops.TensorList`, where the call needs it."""
    if not call.norm and not (call.known and call.row_norms):
        return
    count, carriers = len(tensors.chunks), with_norms("gradient", tensors.rules)
    if count:
        norm_kernel[(count,)](
            tensors.rows,
            tensors.chunks,
            tensors.partials,
            tensors.carried,
            carriers=carriers,
            accumulated=call.sum,
            gradients=call.norm,
            block=tensors.table.chunk,
            **LAUNCH,
        )
    if call.norm:
        collect(tensors, 0.0, micro=False)
    if call.row_norms:
        collect_rows(tensors, _source(call), carriers=carriers, gradients=call.norm)


def collect(tensors: Any, examples: float, micro: bool) -> None:
    """Launch `collect_kernel`."""
    collect_kernel[(1,)](
        tensors.chunks,
        tensors.share,
        tensors.partials,
        tensors.ledger.values,
        len(tensors.chunks),
        examples,
        micro=micro,
        block=1024,
        **LAUNCH,
    )


def prepare(tensors: Any, call: Any) -> None:
    """The prepare phase, where the call needs it."""
    count, prepared = len(tensors.chunks), with_norms("direction", tensors.rules)
    if not call.prepare or not count:
        return
    prepare_kernel[(count,)](
        tensors.rows,
        tensors.chunks,
        tensors.hyper,
        tensors.steps,
        tensors.scalars,
        tensors.partials,
        tensors.ledger.values,
        rules=selection(prepared),
        accumulated=call.sum,
        block=tensors.table.chunk,
        **_decision(call),
        **LAUNCH,
    )
    collect_rows(tensors, _source(call), prepared=prepared)


def update(tensors: Any, call: Any) -> None:
    """The update phase and the bookkeeping."""
    count, decision = len(tensors.chunks), _decision(call)
    if count:
        update_kernel[(count,)](
            tensors.rows,
            tensors.chunks,
            tensors.hyper,
            tensors.steps,
            tensors.scalars,
            tensors.norms,
            tensors.partials,
            tensors.ledger.values,
            seed_low=call.seed & 0xFFFFFFFF,
            seed_high=call.seed >> 32,
            rules=selection(tensors.rules),
            prepared=with_norms("direction", tensors.rules),
            carriers=with_norms("gradient", tensors.rules),
            accumulated=call.sum,
            block=tensors.table.chunk,
            **decision,
            **LAUNCH,
        )
    noise = {"examples": call.examples, "micro_batches": call.micro_batches, "noise": call.noise}
    settle_rows_kernel[(tensors.table.row_count,)](
        tensors.rows,
        tensors.starts,
        tensors.hyper,
        tensors.steps,
        tensors.scalars,
        tensors.carried,
        tensors.partials if tensors.layers is None else tensors.layers,
        tensors.partials,
        tensors.ledger.values,
        source=_source(call),
        carriers=with_norms("gradient", tensors.rules) if call.row_norms else (),
        keepers=selection(with_scalar(tensors.rules)),
        layered=tensors.layers is not None,
        block=64,
        **noise,
        **decision,
        **LAUNCH,
    )
    if not call.follow:
        del decision["follow"]
        settle_kernel[(1,)](tensors.ledger.values, tensors.ledger.ring, **noise, **decision, **LAUNCH)


def step(tensors: Any, call: Any) -> None:
    """One update: all phases."""
    norm(tensors, call)
    prepare(tensors, call)
    update(tensors, call)
