"""Triton twin of ledger.h: verdict, clip coefficient and the pairs of noise norms, once per step; and the programs that
add up what the chunks of a pass have left."""

import triton
import triton.language as tl
from pybatch.kernels.rules import NEXT, NUMBER
from pybatch.kernels.table import (
    BAD,
    CLIP,
    CODE,
    COLUMNS,
    DIRECTION_SQ,
    GROUP,
    HYPER_COLUMNS,
    LARGE_SUM,
    LAYER_BLOCKS,
    LAYER_MICRO_SQ,
    LAYER_RING,
    LAYER_SIZE,
    LAYER_SUM_SQ,
    MICRO_SQ,
    NORM,
    PAIRS,
    PARAM_SQ,
    RING_LENGTH,
    RING_ROWS,
    RING_STEPS,
    ROW_NORMS,
    SKIP,
    SKIPPED,
    SMALL_SUM,
    STORAGES,
    SUM_SQ,
    contains,
    finite,
    row_sums,
)


@triton.jit
def judge(
    ledger, inverse, max_norm, grad_scale, found_inf, taken: tl.constexpr, clip: tl.constexpr, follow: tl.constexpr
):
    """(skip, norm, clip coefficient, factor from the stored gradient to the unscaled mean)."""
    unscaled = tl.full((), inverse, tl.float64)
    skip = tl.full((), 0, tl.int1)
    norm = unscaled * float("nan")
    coefficient = unscaled * 0.0 + 1.0
    if follow:
        skip = tl.load(ledger + SKIP) != 0.0
        unscaled = coefficient
    else:
        if grad_scale != 0:
            unscaled = unscaled / tl.load(grad_scale.to(tl.pointer_type(tl.float32))).to(tl.float64)
        if found_inf != 0:
            skip = tl.load(found_inf.to(tl.pointer_type(tl.float32))) != 0.0
        if taken:
            skip = skip | (tl.load(ledger + BAD) != 0.0)
            norm = tl.sqrt(tl.load(ledger + SUM_SQ)) * unscaled
        if clip:  # torch.nn.utils.clip_grad_norm_'s formula
            ratio = max_norm / (norm + 1e-6)
            coefficient = tl.where(ratio < 1.0, ratio, 1.0)
    return skip, norm, coefficient, unscaled


@triton.jit
def collect_kernel(
    chunks, share, partials, ledger, count, examples: tl.float64, micro: tl.constexpr, block: tl.constexpr
):
    """One program: add the chunks' sums in their order, each by its tensor's share."""
    lanes = tl.arange(0, block)
    small, large = tl.zeros((block,), tl.float64), tl.zeros((block,), tl.float64)
    for start in range(0, count, block):
        chunk = start + lanes
        there = chunk < count
        part = tl.load(share + tl.load(chunks + 2 * chunk, mask=there, other=0), mask=there, other=0.0)
        small += part * tl.load(partials + 2 * chunk, mask=there, other=0.0)
        large += part * tl.load(partials + 2 * chunk + 1, mask=there, other=0.0)
    small_sum, large_sum = tl.sum(small), tl.sum(large)
    tl.store(ledger + SUM_SQ, large_sum)
    bad = 1.0 - (finite(small_sum) & finite(large_sum)).to(tl.float64)
    if micro:
        micro_sq, before = tl.load(ledger + MICRO_SQ), tl.load(ledger + BAD)
        tl.debug_barrier()  # every warp has read them before one thread writes them back
        tl.store(ledger + MICRO_SQ, micro_sq + examples * small_sum)
        bad = tl.maximum(bad, before)
    tl.store(ledger + BAD, bad)


@triton.jit
def collect_rows_kernel(
    rows,
    starts,
    share,
    norms,
    carried,
    layers,
    partials,
    examples: tl.float64,
    source: tl.constexpr,
    carriers: tl.constexpr,
    prepared: tl.constexpr,
    gradients: tl.constexpr,
    micro: tl.constexpr,
    layered: tl.constexpr,
    block: tl.constexpr,
):
    """One program a tensor: its norms from its chunks' sums.

    prepared: rules whose sums are of the parameter and the direction; the others' rows stay. Else the second sum is of
    the gradient (where `gradients`), the first of the parameter (of `carriers`) or of the micro-batch (where `micro`).
    """
    row = tl.program_id(0).to(tl.int64)
    columns = rows + row * COLUMNS
    rule = tl.load(columns + CODE) // STORAGES
    first, second = row_sums(partials, starts, row, block)
    part = tl.load(share + row)
    own = norms + row * ROW_NORMS
    has_gradient = tl.load(columns + source) != 0
    if len(prepared) > 0:
        if has_gradient & contains(prepared, rule):
            tl.store(own + PARAM_SQ, part * first)
            tl.store(own + DIRECTION_SQ, part * second)
    else:
        if gradients:
            tl.store(own + DIRECTION_SQ, part * second)
        if micro & layered:
            layer = layers + row * LAYER_SIZE
            micro_sq = tl.load(layer + LAYER_MICRO_SQ)
            tl.debug_barrier()  # every warp has read it before one thread writes it back
            tl.store(layer + LAYER_MICRO_SQ, micro_sq + examples * part * first)
            tl.store(layer + LAYER_SUM_SQ, part * second)
        if has_gradient & contains(carriers, rule):
            held = tl.load(carried + row)
            held = tl.where(held != held, first, held)
            tl.debug_barrier()  # every warp has read it before one thread writes it back
            tl.store(carried + row, held)
            tl.store(own + PARAM_SQ, part * held)


@triton.jit
def ring_place(ledger):
    """(whether the ring must be folded first, the row where the pair of this step goes)."""
    seen, length = tl.load(ledger + RING_STEPS), tl.load(ledger + RING_LENGTH)
    fold = seen >= RING_ROWS * length
    return fold, tl.where(fold, RING_ROWS // 2, (seen / length).to(tl.int32))


@triton.jit
def fold_ring(ring, count: tl.constexpr):
    """Add adjacent rows together; the second half becomes free."""
    half = tl.arange(0, count // 2)
    for column in tl.static_range(3):
        folded = tl.load(ring + half * 6 + column) + tl.load(ring + half * 6 + 3 + column)
        tl.debug_barrier()  # every row was read before one is overwritten
        tl.store(ring + half * 3 + column, folded)
        tl.store(ring + (half + count // 2) * 3 + column, folded * 0.0)
        tl.debug_barrier()


@triton.jit
def add_pair(slot, micro_sq, sum_sq, inverse, examples, micro_batches, unscaled):
    """McCandlish et al. 2018, appendix A.1."""
    large_n, small_n = examples, examples / micro_batches
    scale = unscaled / inverse  # AMP alone: micro-batch norms are of means already
    small, large = scale * scale * micro_sq / examples, unscaled * unscaled * sum_sq
    count, first, second = tl.load(slot), tl.load(slot + 1), tl.load(slot + 2)
    tl.debug_barrier()  # every warp has read them before one thread writes them back
    tl.store(slot, count + 1.0)
    tl.store(slot + 1, first + (large_n * large - small_n * small) / (large_n - small_n))
    tl.store(slot + 2, second + (small - large) / (1.0 / small_n - 1.0 / large_n))


@triton.jit
def settle_rows_kernel(
    rows,
    starts,
    hyper,
    steps,
    scalars,
    carried,
    layers,
    partials,
    ledger,
    inverse: tl.float64,
    examples: tl.float64,
    micro_batches: tl.float64,
    max_norm: tl.float64,
    grad_scale: tl.int64,
    found_inf: tl.int64,
    source: tl.constexpr,
    carriers: tl.constexpr,
    keepers: tl.constexpr,
    taken: tl.constexpr,
    clip: tl.constexpr,
    follow: tl.constexpr,
    noise: tl.constexpr,
    layered: tl.constexpr,
    block: tl.constexpr,
):
    """One program a tensor, after its last element was written: step count, what is kept of it, its noise ring."""
    row = tl.program_id(0).to(tl.int64)
    columns = rows + row * COLUMNS
    skip, _norm, _clip, unscaled = judge(ledger, inverse, max_norm, grad_scale, found_inf, taken, clip, follow)
    moved = (tl.load(columns + source) != 0) & (skip == 0)
    step = tl.load(steps + row)
    tl.debug_barrier()  # every warp has read it before one thread writes it back
    if moved:
        tl.store(steps + row, step + 1.0)
        for i in tl.static_range(len(keepers)):
            if tl.load(columns + CODE) // STORAGES == keepers[i][NUMBER]:
                held = tl.load(scalars + row).to(tl.float64)
                tl.debug_barrier()  # every warp has read it before one thread writes it back
                group = hyper + tl.load(columns + GROUP) * HYPER_COLUMNS
                kept = keepers[i][NEXT](group, step.to(tl.float64) + 1.0, held)
                tl.store(scalars + row, kept.to(tl.float32))
        if contains(carriers, tl.load(columns + CODE) // STORAGES):
            first, _second = row_sums(partials, starts, row, block)
            tl.store(carried + row, first)
    if layered and not follow:
        layer = layers + row * LAYER_SIZE
        if noise:
            fold, place = ring_place(ledger)
            if fold:
                fold_ring(layer + LAYER_RING, LAYER_BLOCKS)
            if moved:
                slot = layer + LAYER_RING + 3 * (place // (RING_ROWS // LAYER_BLOCKS))
                micro_sq, sum_sq = tl.load(layer + LAYER_MICRO_SQ), tl.load(layer + LAYER_SUM_SQ)
                add_pair(slot, micro_sq, sum_sq, inverse, examples, micro_batches, unscaled)
        tl.debug_barrier()
        tl.store(layer + LAYER_MICRO_SQ, 0.0)
        tl.store(layer + LAYER_SUM_SQ, 0.0)


@triton.jit
def settle_kernel(
    ledger,
    ring,
    inverse: tl.float64,
    examples: tl.float64,
    micro_batches: tl.float64,
    max_norm: tl.float64,
    grad_scale: tl.int64,
    found_inf: tl.int64,
    taken: tl.constexpr,
    clip: tl.constexpr,
    noise: tl.constexpr,
):
    """One program, after the last tensor was settled: noise ring, ledger."""
    skip, norm, coefficient, unscaled = judge(ledger, inverse, max_norm, grad_scale, found_inf, taken, clip, False)
    counted = tl.where(skip, 0.0, 1.0).to(tl.float64)
    skipped, pairs = tl.load(ledger + SKIPPED), tl.load(ledger + PAIRS)
    small_sum, large_sum = tl.load(ledger + SMALL_SUM), tl.load(ledger + LARGE_SUM)
    seen, length = tl.load(ledger + RING_STEPS), tl.load(ledger + RING_LENGTH)
    fold, place = ring_place(ledger)
    tl.debug_barrier()  # every warp has read them before one thread writes them back
    if noise:
        if fold:
            fold_ring(ring, RING_ROWS)
            tl.store(ledger + RING_LENGTH, length * 2.0)
        tl.store(ledger + RING_STEPS, seen + 1.0)
        if skip == 0:
            micro_sq, sum_sq = tl.load(ledger + MICRO_SQ), tl.load(ledger + SUM_SQ)
            add_pair(ring + 3 * place, micro_sq, sum_sq, inverse, examples, micro_batches, unscaled)
            tl.store(ledger + PAIRS, pairs + 1.0)
            tl.store(ledger + SMALL_SUM, small_sum + examples / micro_batches)
            tl.store(ledger + LARGE_SUM, large_sum + examples)
    tl.store(ledger + SKIPPED, skipped + 1.0 - counted)
    tl.store(ledger + SKIP, 1.0 - counted)
    tl.store(ledger + NORM, norm)
    tl.store(ledger + CLIP, coefficient)
    tl.debug_barrier()
    tl.store(ledger + SUM_SQ, 0.0)
    tl.store(ledger + BAD, 0.0)
    tl.store(ledger + MICRO_SQ, 0.0)
