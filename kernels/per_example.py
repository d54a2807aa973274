"""Triton: squared per-example gradient norms. Products accumulate in fp32 in registers and are never written out.

rows is [n, groups, t, R] and cols [n, groups, t, C] with any strides; a weight's per-example gradient is
sum_t rows_t (x) cols_t. Each program writes one partial sum as float64; torch adds them in a fixed order.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from pybatch.kernels.table import LAUNCH


class Tiling(NamedTuple):
    """How a product is cut: edge of a tile of the weight or the Gram matrix, length summed at a time, warps.

    A program keeps two fp32 accumulators of a tile in its registers.
    """

    tile: int
    step: int
    warps: int


SMALL = Tiling(64, 32, 4)
# The products of a tile of 64 make 32 FLOPs of each byte of 16-bit numbers they load: some 6 TB/s of a large GPU's L2
# cache then feed 200 TFLOP/s, a quarter of what its matrix units do. Twice the edge is twice the work a byte. It takes
# 96 KiB of shared memory, which is there from Hopper on.
LARGE = Tiling(128, 64, 8)
LARGE_FROM = (9, 0)  # compute capability


@triton.jit
def tile(base, at, size, stride, along, width, along_stride):
    """Rows `at` and columns `along` of a strided matrix, zero outside it."""
    inside = (at[:, None] < size) & (along[None, :] < width)
    return tl.load(base + at[:, None] * stride + along[None, :] * along_stride, mask=inside, other=0.0)


@triton.jit
def gram_kernel(
    rows,
    cols,
    partials,
    groups,
    t,
    r,
    c,
    rn: tl.int64,
    rg: tl.int64,
    rt: tl.int64,
    rr: tl.int64,
    cn: tl.int64,
    cg: tl.int64,
    ct: tl.int64,
    cc: tl.int64,
    block: tl.constexpr,
    step: tl.constexpr,
):
    """One program a pair of blocks of positions: sum of (rows_t . rows_t')(cols_t . cols_t') over it."""
    both, i, j = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    value = tl.zeros((), tl.float64)
    if j <= i:  # the matrix is symmetric: blocks off the diagonal count twice
        rows += (both // groups) * rn + (both % groups) * rg
        cols += (both // groups) * cn + (both % groups) * cg
        here, there = i * block + tl.arange(0, block), j * block + tl.arange(0, block)
        first = tl.zeros((block, block), tl.float32)
        for start in range(0, r, step):
            k = start + tl.arange(0, step)
            a, b = tile(rows, here, t, rt, k, r, rr), tile(rows, there, t, rt, k, r, rr)
            first = tl.dot(a, tl.trans(b), first, input_precision="ieee")
        second = tl.zeros((block, block), tl.float32)
        for start in range(0, c, step):
            k = start + tl.arange(0, step)
            a, b = tile(cols, here, t, ct, k, c, cc), tile(cols, there, t, ct, k, c, cc)
            second = tl.dot(a, tl.trans(b), second, input_precision="ieee")
        value = tl.sum(tl.sum(first * second, axis=1).to(tl.float64))
        if j < i:
            value = value * 2.0
    tl.store(partials + (both * tl.num_programs(1) + i) * tl.num_programs(2) + j, value)


@triton.jit
def weight_kernel(
    rows,
    cols,
    partials,
    total,
    n,
    groups,
    t,
    r,
    c,
    rn: tl.int64,
    rg: tl.int64,
    rt: tl.int64,
    rr: tl.int64,
    cn: tl.int64,
    cg: tl.int64,
    ct: tl.int64,
    cc: tl.int64,
    examples,
    block: tl.constexpr,
    step: tl.constexpr,
    summed: tl.constexpr,
):
    """One program a tile of the weight and a run of examples: each one's tile is formed, squared and, where `summed`,
    added to the whole gradient, which then costs no further product."""
    both, i, j = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    run, group = both // groups, both % groups
    rows += group * rg
    cols += group * cg
    here, there = i * block + tl.arange(0, block), j * block + tl.arange(0, block)
    whole = tl.zeros((block, block), tl.float32)
    for local in range(examples):
        example = run * examples + local
        if example < n:
            found = tl.zeros((block, block), tl.float32)
            for start in range(0, t, step):
                k = start + tl.arange(0, step)
                a = tile(rows + example * rn, here, r, rr, k, t, rt)
                b = tile(cols + example * cn, k, t, ct, there, c, cc)
                found = tl.dot(a, b, found, input_precision="ieee")
            if summed:
                whole += found
            value = tl.sum(tl.sum(found * found, axis=1).to(tl.float64))
            place = ((example * groups + group) * tl.num_programs(1) + i) * tl.num_programs(2) + j
            tl.store(partials + place, value)
    if summed:
        inside = (here[:, None] < r) & (there[None, :] < c)
        tl.store(total + (both * r + here[:, None]) * c + there[None, :], whole, mask=inside)


@triton.jit
def single_kernel(
    rows,
    cols,
    partials,
    groups,
    r,
    c,
    rn: tl.int64,
    rg: tl.int64,
    rr: tl.int64,
    cn: tl.int64,
    cg: tl.int64,
    cc: tl.int64,
    block: tl.constexpr,
):
    """One program an example and group: |rows|^2 |cols|^2."""
    both = tl.program_id(0).to(tl.int64)
    rows += (both // groups) * rn + (both % groups) * rg
    cols += (both // groups) * cn + (both % groups) * cg
    lanes = tl.arange(0, block)
    first, second = tl.zeros((block,), tl.float64), tl.zeros((block,), tl.float64)
    for start in range(0, r, block):
        k = start + lanes
        x = tl.load(rows + k * rr, mask=k < r, other=0.0).to(tl.float32)
        first += (x * x).to(tl.float64)
    for start in range(0, c, block):
        k = start + lanes
        x = tl.load(cols + k * cc, mask=k < c, other=0.0).to(tl.float32)
        second += (x * x).to(tl.float64)
    tl.store(partials + both, tl.sum(first) * tl.sum(second))


@triton.jit
def picked_kernel(
    ordered, order, values, partials, t, c, vn: tl.int64, vt: tl.int64, vc: tl.int64, block: tl.constexpr
):
    """One program a place in an example's sorted tokens: where a token begins, the norm of the sum over its places."""
    both = tl.program_id(0).to(tl.int64)  # one dimension: the second of a grid ends at 65 535, which t may exceed
    example, place = both // t, (both % t).to(tl.int32)
    ordered += example * t
    order += example * t
    values += example * vn
    token = tl.load(ordered + place)
    before = tl.load(ordered + place - 1, mask=place > 0, other=-1)
    value = tl.zeros((), tl.float64)
    if token != before:
        end = place + 1
        while tl.load(ordered + end, mask=end < t, other=-1) == token:
            end += 1
        for start in range(0, c, block):
            k = start + tl.arange(0, block)
            found = tl.zeros((block,), tl.float32)
            for at in range(place, end):
                row = values + tl.load(order + at) * vt
                found += tl.load(row + k * vc, mask=k < c, other=0.0).to(tl.float32)
            value += tl.sum(found * found).to(tl.float64)
    tl.store(partials + example * t + place, value)


@triton.jit
def norm_backward_kernel(
    grad,
    x,
    weight,
    dx,
    scaled,
    plain,
    t,
    width,
    places,
    eps,
    centred: tl.constexpr,
    affine: tl.constexpr,
    block: tl.constexpr,
):
    """One program a run of positions of one example, through LayerNorm (centred) or RMSNorm over `width`.

    Reads gradient and input once; writes the input's gradient, and the run's sums for the example's weight gradient
    (gradient times normalized input) and bias gradient. Contiguous [n, t, width].
    """
    example, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k = tl.arange(0, block)
    inside = k < width
    w = tl.full((block,), 1.0, tl.float32)
    if affine:
        w = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    sum_scaled, sum_plain = tl.zeros((block,), tl.float32), tl.zeros((block,), tl.float32)
    for local in range(places):
        position = run * places + local
        there = inside & (position + 0 * k < t)
        row = (example * t + position) * width
        value = tl.load(x + row + k, mask=there, other=0.0).to(tl.float32)
        g = tl.load(grad + row + k, mask=there, other=0.0).to(tl.float32)
        if centred:
            value = tl.where(inside, value - tl.sum(value) / width, 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(value * value) / width + eps)
        normal = value * scale
        sum_scaled += g * normal
        sum_plain += g
        gw = g * w
        back = gw - normal * (tl.sum(gw * normal) / width)
        if centred:
            back -= tl.sum(gw) / width
        tl.store(dx + row + k, (back * scale).to(dx.dtype.element_ty), mask=there)
    place = (example * tl.num_programs(1) + run) * width + k
    tl.store(scaled + place, sum_scaled, mask=inside)
    tl.store(plain + place, sum_plain, mask=inside)


def single(rows: Any, cols: Any) -> Any:
    """|rows|^2 |cols|^2 summed over groups, where t = 1: float64 [n]."""
    n, groups, _, r = rows.shape
    partials = rows.new_empty(n, groups, dtype=torch.float64)
    strides = [*rows.stride()[:2], rows.stride(3), *cols.stride()[:2], cols.stride(3)]
    single_kernel[(n * groups,)](rows, cols, partials, groups, r, cols.shape[3], *strides, block=1024, **LAUNCH)
    return partials.sum(1)


def tiling(x: Any, *sizes: int) -> Tiling:
    """How a product of `x` is cut whose result has these sizes."""
    wide = x.element_size() == 2 and min(sizes) >= LARGE.tile
    return LARGE if wide and feeds_large_tiles(x.device) else SMALL


def feeds_large_tiles(device: Any) -> bool:
    """Whether a device has the shared memory of LARGE."""
    return (
        device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= LARGE_FROM
    )


def gram(rows: Any, cols: Any) -> Any:
    """sum_tt' (rows_t . rows_t')(cols_t . cols_t') per example: float64 [n]."""
    n, groups, t, r = rows.shape
    cut = tiling(rows, t)
    blocks = triton.cdiv(t, cut.tile)
    partials = rows.new_empty(n, groups * blocks * blocks, dtype=torch.float64)
    gram_kernel[(n * groups, blocks, blocks)](
        rows,
        cols,
        partials,
        groups,
        t,
        r,
        cols.shape[3],
        *rows.stride(),
        *cols.stride(),
        block=cut.tile,
        step=cut.step,
        num_warps=cut.warps,
        **LAUNCH,
    )
    return partials.sum(1)


def weight(rows: Any, cols: Any, runs: int | None = None) -> tuple[Any, Any]:
    """|sum_t rows_t (x) cols_t|^2 per example, float64 [n], and with `runs` the sum over examples, fp32 [g, R, C].

    `runs` splits the examples between programs: more fill the device, fewer write fewer partial gradients.
    """
    n, groups, t, r = rows.shape
    c = cols.shape[3]
    cut = tiling(rows, r, c)
    grid = triton.cdiv(r, cut.tile), triton.cdiv(c, cut.tile)
    partials = rows.new_empty(n, groups * grid[0] * grid[1], dtype=torch.float64)
    split = min(runs or n, n)
    total = rows.new_empty(split if runs else 0, groups, r, c, dtype=torch.float32)
    weight_kernel[(split * groups, *grid)](
        rows,
        cols,
        partials,
        total,
        n,
        groups,
        t,
        r,
        c,
        *rows.stride(),
        *cols.stride(),
        triton.cdiv(n, split),
        block=cut.tile,
        step=cut.step,
        num_warps=cut.warps,
        summed=runs is not None,
        **LAUNCH,
    )
    return partials.sum(1), total.sum(0) if runs else None


def picked(index: Any, values: Any) -> Any:
    """|sum_t onehot(index_t) (x) values_t|^2 over [n, t] and [n, t, C], a repeated token adding up first."""
    ordered, order = index.sort(dim=1)
    n, t = index.shape
    partials = values.new_empty(n, t, dtype=torch.float64)
    block = min(1024, triton.next_power_of_2(values.shape[2]))
    picked_kernel[(n * t,)](
        ordered, order, values, partials, t, values.shape[2], *values.stride(), block=block, **LAUNCH
    )
    return partials.sum(1)


def norm_backward(grad: Any, x: Any, weight: Any, eps: float, centred: bool, runs: int) -> tuple[Any, Any, Any]:
    """Through LayerNorm (centred) or RMSNorm of [n, t, width]: (dx, weight gradient [n, width], bias gradient)."""
    n, t, width = x.shape
    places = triton.cdiv(t, runs)
    runs = triton.cdiv(t, places)
    dx = torch.empty_like(x)
    scaled, plain = (x.new_empty(n, runs, width, dtype=torch.float32) for _ in range(2))
    norm_backward_kernel[(n, runs)](
        grad,
        x,
        x if weight is None else weight,
        dx,
        scaled,
        plain,
        t,
        width,
        places,
        eps,
        centred=centred,
        affine=weight is not None,
        block=triton.next_power_of_2(width),
        **LAUNCH,
    )
    return dx, scaled.sum(1), plain.sum(1)
