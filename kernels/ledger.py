"""Triton twin of ledger.h: verdict, clip coefficient and the pair of noise norms, once per step."""

import triton
import triton.language as tl
from pybatch.kernels.table import (
    BAD,
    CLIP,
    COLUMNS,
    LARGE_SUM,
    MICRO_SQ,
    NORM,
    PAIRS,
    RING_LENGTH,
    RING_ROWS,
    RING_STEPS,
    SKIPPED,
    SMALL_SUM,
    SUM_SQ,
)


@triton.jit
def judge(ledger, inverse, max_norm, grad_scale, found_inf, taken: tl.constexpr, clip: tl.constexpr):
    """(skip, norm, clip coefficient, factor from the stored gradient to the unscaled mean)."""
    unscaled = tl.full((), inverse, tl.float64)
    skip = tl.full((), 0, tl.int1)
    if grad_scale != 0:
        unscaled = unscaled / tl.load(grad_scale.to(tl.pointer_type(tl.float32))).to(tl.float64)
    if found_inf != 0:
        skip = tl.load(found_inf.to(tl.pointer_type(tl.float32))) != 0.0
    norm = unscaled * float("nan")
    coefficient = unscaled * 0.0 + 1.0
    if taken:
        skip = skip | (tl.load(ledger + BAD) != 0.0)
        norm = tl.sqrt(tl.load(ledger + SUM_SQ)) * unscaled
    if clip:  # torch.nn.utils.clip_grad_norm_'s formula
        ratio = max_norm / (norm + 1e-6)
        coefficient = tl.where(ratio < 1.0, ratio, 1.0)
    return skip, norm, coefficient, unscaled


@triton.jit
def collect_kernel(partials, ledger, count, examples: tl.float64, micro: tl.constexpr, block: tl.constexpr):
    """One program: add the chunks' sums in their order."""
    lanes = tl.arange(0, block)
    small, large = tl.zeros((block,), tl.float64), tl.zeros((block,), tl.float64)
    for start in range(0, count, block):
        chunk = start + lanes
        small += tl.load(partials + 2 * chunk, mask=chunk < count, other=0.0)
        large += tl.load(partials + 2 * chunk + 1, mask=chunk < count, other=0.0)
    small_sum, large_sum = tl.sum(small), tl.sum(large)
    tl.store(ledger + SUM_SQ, large_sum)
    bad = ((small_sum != small_sum) | (large_sum != large_sum)).to(tl.float64)
    if micro:
        tl.store(ledger + MICRO_SQ, tl.load(ledger + MICRO_SQ) + examples * small_sum)
        bad = tl.maximum(bad, tl.load(ledger + BAD))
    tl.store(ledger + BAD, bad)


@triton.jit
def settle_kernel(
    rows,
    row_count,
    source: tl.constexpr,
    steps,
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
    block: tl.constexpr,
):
    """One program, after the last element was written: step counts, noise ring, ledger."""
    skip, norm, coefficient, unscaled = judge(ledger, inverse, max_norm, grad_scale, found_inf, taken, clip)
    counted = tl.where(skip, 0.0, 1.0).to(tl.float64)
    lanes = tl.arange(0, block)
    for start in range(0, row_count, block):
        row = (start + lanes).to(tl.int64)
        there = row < row_count
        has = tl.load(rows + row * COLUMNS + source, mask=there, other=0) != 0
        step = tl.load(steps + row, mask=there, other=0.0)
        tl.store(steps + row, step + counted.to(tl.float32), mask=there & has)
    if noise:
        seen, length = tl.load(ledger + RING_STEPS), tl.load(ledger + RING_LENGTH)
        tl.debug_barrier()  # every warp has read them before one thread writes them back
        if seen >= RING_ROWS * length:
            half = tl.arange(0, RING_ROWS // 2)
            for column in tl.static_range(3):
                folded = tl.load(ring + half * 6 + column) + tl.load(ring + half * 6 + 3 + column)
                tl.debug_barrier()  # every row was read before one is overwritten
                tl.store(ring + half * 3 + column, folded)
                tl.store(ring + (half + RING_ROWS // 2) * 3 + column, folded * 0.0)
                tl.debug_barrier()
            length = length * 2.0
            tl.store(ledger + RING_LENGTH, length)
        slot = ring + 3 * (seen / length).to(tl.int32)
        tl.store(ledger + RING_STEPS, seen + 1.0)
        if skip == 0:
            large_n, small_n = examples, examples / micro_batches
            scale = unscaled / inverse
            small, large = scale * scale * tl.load(ledger + MICRO_SQ) / examples, norm * norm
            tl.store(slot, tl.load(slot) + 1.0)
            tl.store(slot + 1, tl.load(slot + 1) + (large_n * large - small_n * small) / (large_n - small_n))
            tl.store(slot + 2, tl.load(slot + 2) + (small - large) / (1.0 / small_n - 1.0 / large_n))
            tl.store(ledger + PAIRS, tl.load(ledger + PAIRS) + 1.0)
            tl.store(ledger + SMALL_SUM, tl.load(ledger + SMALL_SUM) + small_n)
            tl.store(ledger + LARGE_SUM, tl.load(ledger + LARGE_SUM) + large_n)
    tl.store(ledger + SKIPPED, tl.load(ledger + SKIPPED) + 1.0 - counted)
    tl.store(ledger + NORM, norm)
    tl.store(ledger + CLIP, coefficient)
    tl.debug_barrier()
    tl.store(ledger + SUM_SQ, 0.0)
    tl.store(ledger + BAD, 0.0)
    tl.store(ledger + MICRO_SQ, 0.0)
