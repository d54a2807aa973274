"""Triton twin of step.cu, the phases of a step over a list of tensors: norms, then load -> rule -> store.

How the rows of a list differ is a constant of its kernels, a few `kinds`: (code, type of the gradient), with which a
program compares its row's. So rules, storages and types are chosen outside the loop over elements.
"""

import triton
import triton.language as tl
from pybatch.kernels.chunk import add_squares, in_vectors, lanes, load_as_f32, locate, squares, total_squares
from pybatch.kernels.ledger import judge
from pybatch.kernels.narrow import load_state, store_state
from pybatch.kernels.rules import (
    CARRIED,
    CODE_OF,
    DIRECTION,
    MAKE,
    PREPARE,
    PREPARED,
    RULE_OF,
    SQUARES,
    STATES,
    STORAGE_OF,
    TYPE_OF,
    UPDATE,
)
from pybatch.kernels.storage import is_stochastic, load_param, random_key, store_param
from pybatch.kernels.table import (
    CODE,
    DIRECTION_SQ,
    GRAD_TYPE,
    GROUP,
    HYPER_COLUMNS,
    MASTER,
    MAXIMIZE,
    PARAM,
    PARAM_SQ,
    ROW_NORMS,
    SALT,
    SCALE,
    STATE,
    STATES_8BIT,
    STATES_BF16,
    SUM,
)


@triton.jit
def is_of(kinds: tl.constexpr, i: tl.constexpr, row, accumulated: tl.constexpr):
    """Whether a row is of this kind; a sum is fp32."""
    same = tl.load(row + CODE) == kinds[i][CODE_OF]
    return same if accumulated else same & (tl.load(row + GRAD_TYPE) == kinds[i][TYPE_OF])


@triton.jit
def memory_of(row, source: tl.constexpr, kinds: tl.constexpr, i: tl.constexpr, state_type: tl.constexpr):
    """Addresses of a row's (parameter, master, gradient, states, scales), and those that vectors need, or-ed."""
    param, master, grad = tl.load(row + PARAM), tl.load(row + MASTER), tl.load(row + source)
    joined, states, scales = param | master | grad, (), ()
    for k in tl.static_range(kinds[i][RULE_OF + STATES]):
        state = tl.load(row + STATE + k)
        joined = joined | state
        states = states + (state,)  # noqa: RUF005  Triton knows no star
        scales = scales + (tl.load(row + SCALE + k) if state_type == STATES_8BIT else state,)  # noqa: RUF005
    return (param, master, grad, states, scales), joined


@triton.jit
def load_states(
    at, codes, kinds: tl.constexpr, i: tl.constexpr, kind: tl.constexpr, begin, offset, mask, vectors: tl.constexpr
):
    """A tuple of blocks."""
    s = ()
    for k in tl.static_range(kinds[i][RULE_OF + STATES]):
        sign = 1 - ((kinds[i][RULE_OF + SQUARES] >> k) & 1)
        s = s + (load_state(at[3][k], at[4][k], codes, kind, sign, begin, offset, mask, vectors),)  # noqa: RUF005
    return s


@triton.jit
def store_states(
    at,
    s,
    key,
    kinds: tl.constexpr,
    i: tl.constexpr,
    kind: tl.constexpr,
    begin,
    start,
    size,
    block: tl.constexpr,
    vectors: tl.constexpr,
):
    """Write them back."""
    for k in tl.static_range(kinds[i][RULE_OF + STATES]):
        sign = 1 - ((kinds[i][RULE_OF + SQUARES] >> k) & 1)
        store_state(at[3][k], at[4][k], s[k], kind, k, sign, begin, start, size, key, block, vectors)


@triton.jit
def chunk_key(row, seed_low, seed_high, step, begin, random: tl.constexpr):
    """Of a chunk whose parameter or states are rounded at random in the step at hand."""
    key = tl.zeros((), tl.uint32)
    if random:
        low, high = tl.full((), seed_low, tl.int64), tl.full((), seed_high, tl.int64)
        key = random_key(low, high, tl.load(row + SALT), step.to(tl.int64), begin)
    return key


@triton.jit
def param_squares(param, master, storage: tl.constexpr, begin, size, block: tl.constexpr):
    """Sum of squares of a chunk's parameter, as it is stored."""
    middle, large, small = (
        tl.zeros((block,), tl.float32),
        tl.zeros((block,), tl.float32),
        tl.zeros((block,), tl.float32),
    )
    whole = in_vectors(param | master, size, block)
    for start in range(0, whole, block):
        offset, mask = lanes(start, size, block, True)
        p = load_param(param, master, storage, begin, offset, mask, True)
        middle, large, small = add_squares(middle, large, small, p)
    for start in range(whole, size, block):
        offset, mask = lanes(start, size, block, False)
        p = load_param(param, master, storage, begin, offset, mask, False)
        middle, large, small = add_squares(middle, large, small, p)
    return total_squares(middle, large, small)


@triton.jit
def norm_kernel(
    rows,
    chunks,
    partials,
    carried,
    kinds: tl.constexpr,
    source: tl.constexpr,
    gradients: tl.constexpr,
    block: tl.constexpr,
    chunk_size: tl.constexpr,
):
    """One program a chunk: the sums of squares of its parameter (where its rule carries it) and of its gradient."""
    chunk, index, row, begin, size = locate(rows, chunks, chunk_size)
    param_sq, gradient_sq = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    grad, held = tl.load(row + source), tl.load(carried + index)
    for i in tl.static_range(len(kinds)):
        if (grad != 0) & is_of(kinds, i, row, source == SUM):
            if gradients:
                gradient_sq = squares(grad, kinds[i][TYPE_OF], begin, size, block)
            if kinds[i][RULE_OF + CARRIED]:  # noqa: SIM102  of these one is a constant
                if held != held:
                    param, master = tl.load(row + PARAM), tl.load(row + MASTER)
                    param_sq = param_squares(param, master, kinds[i][STORAGE_OF], begin, size, block)
    tl.store(partials + 2 * chunk, param_sq)
    tl.store(partials + 2 * chunk + 1, gradient_sq)


# What the blocks of a chunk share is a tuple `chunk`: (addresses as `memory_of` gives them, codes, key, first element,
# size, the rule's scalars, factor of the stored gradient).


@triton.jit
def prepare_block(
    chunk, start, kinds: tl.constexpr, i: tl.constexpr, kind: tl.constexpr, block: tl.constexpr, vectors: tl.constexpr
):
    """The states of a block of elements; returns (parameter, direction), 0 where there is no element."""
    at, codes, key, begin, size, made, factor = chunk
    offset, mask = lanes(start, size, block, vectors)
    p = load_param(at[0], at[1], kinds[i][STORAGE_OF], begin, offset, mask, vectors)
    g = load_as_f32(at[2], kinds[i][TYPE_OF], begin, offset, mask, vectors) * factor
    s = load_states(at, codes, kinds, i, kind, begin, offset, mask, vectors)
    s = kinds[i][RULE_OF + PREPARE](made, g, s)
    store_states(at, s, key, kinds, i, kind, begin, start, size, block, vectors)
    return p, tl.where(mask, kinds[i][RULE_OF + DIRECTION](made, p, s), 0.0)


@triton.jit
def prepare_chunk(chunk, whole, kinds: tl.constexpr, i: tl.constexpr, kind: tl.constexpr, block: tl.constexpr):
    """The states of a chunk, `whole` of its elements by vectors; returns sums of squares of parameter and direction."""
    a0, a1, a2 = tl.zeros((block,), tl.float32), tl.zeros((block,), tl.float32), tl.zeros((block,), tl.float32)
    b0, b1, b2 = tl.zeros((block,), tl.float32), tl.zeros((block,), tl.float32), tl.zeros((block,), tl.float32)
    for start in range(0, whole, block):
        p, direction = prepare_block(chunk, start, kinds, i, kind, block, True)
        a0, a1, a2 = add_squares(a0, a1, a2, p)
        b0, b1, b2 = add_squares(b0, b1, b2, direction)
    for start in range(whole, chunk[4], block):
        p, direction = prepare_block(chunk, start, kinds, i, kind, block, False)
        a0, a1, a2 = add_squares(a0, a1, a2, p)
        b0, b1, b2 = add_squares(b0, b1, b2, direction)
    return total_squares(a0, a1, a2), total_squares(b0, b1, b2)


@triton.jit
def update_block(
    chunk, start, kinds: tl.constexpr, i: tl.constexpr, kind: tl.constexpr, block: tl.constexpr, vectors: tl.constexpr
):
    """The whole update of a block of elements."""
    at, codes, key, begin, size, made, factor = chunk
    offset, mask = lanes(start, size, block, vectors)
    p = load_param(at[0], at[1], kinds[i][STORAGE_OF], begin, offset, mask, vectors)
    g = p
    if not kinds[i][RULE_OF + PREPARED]:  # else the states are final and no gradient is needed
        g = load_as_f32(at[2], kinds[i][TYPE_OF], begin, offset, mask, vectors) * factor
    s = load_states(at, codes, kinds, i, kind, begin, offset, mask, vectors)
    p, s = kinds[i][RULE_OF + UPDATE](made, p, g, s)
    store_param(at[0], at[1], kinds[i][STORAGE_OF], begin, offset, p, mask, key, vectors)
    if not kinds[i][RULE_OF + PREPARED]:
        store_states(at, s, key, kinds, i, kind, begin, start, size, block, vectors)


@triton.jit
def unscale_block(grad, scale, dtype: tl.constexpr, begin, start, size, block: tl.constexpr, vectors: tl.constexpr):
    """Leave a block of the gradient divided by the scale."""
    offset, mask = lanes(start, size, block, vectors)
    g = load_as_f32(grad, dtype, begin, offset, mask, vectors) / scale
    store_param(grad, grad, dtype, begin, offset, g, mask, 0, vectors)


@triton.jit
def unscale_chunk(grad, grad_scale, dtype: tl.constexpr, begin, size, block: tl.constexpr):
    """Leave a chunk's gradient as torch's fused optimizers do; what was just read comes from the cache."""
    scale = tl.load(grad_scale.to(tl.pointer_type(tl.float32)))
    whole = in_vectors(grad, size, block)
    for start in range(0, whole, block):
        unscale_block(grad, scale, dtype, begin, start, size, block, True)
    for start in range(whole, size, block):
        unscale_block(grad, scale, dtype, begin, start, size, block, False)


@triton.jit
def step_kernel(
    rows,
    chunks,
    hyper,
    steps,
    scalars,
    norms,
    partials,
    ledger,
    codes,
    inverse: tl.float64,
    max_norm: tl.float64,
    grad_scale: tl.int64,
    found_inf: tl.int64,
    seed_low: tl.int64,
    seed_high: tl.int64,
    kinds: tl.constexpr,
    source: tl.constexpr,
    state_type: tl.constexpr,
    preparing: tl.constexpr,
    unscale: tl.constexpr,
    taken: tl.constexpr,
    clip: tl.constexpr,
    follow: tl.constexpr,
    block: tl.constexpr,
    chunk_size: tl.constexpr,
):
    """One program a chunk: where `preparing` its states, and the sums of squares of parameter and direction; else the
    whole update of its elements."""
    number, index, row, begin, size = locate(rows, chunks, chunk_size)
    skip, _norm, coefficient, unscaled = judge(ledger, inverse, max_norm, grad_scale, found_inf, taken, clip, follow)
    has_gradient = (tl.load(row + source) != 0) & (skip == 0)
    group, own = hyper + tl.load(row + GROUP) * HYPER_COLUMNS, norms + index * ROW_NORMS
    for i in tl.static_range(len(kinds)):
        if has_gradient & is_of(kinds, i, row, source == SUM):
            step = tl.load(steps + index).to(tl.float64) + 1.0
            factor = tl.where(tl.load(group + MAXIMIZE) != 0.0, -unscaled, unscaled) * coefficient
            param_sq, other_sq = coefficient * 0.0, coefficient * 0.0
            if not preparing:
                param_sq, other_sq = tl.load(own + PARAM_SQ), tl.load(own + DIRECTION_SQ)
            if kinds[i][RULE_OF + CARRIED]:  # the norm of the gradient as this rule sees it
                other_sq = other_sq * factor * factor
            held = tl.load(scalars + index).to(tl.float64)
            made = kinds[i][RULE_OF + MAKE](group, step, held, param_sq, other_sq)
            at, joined = memory_of(row, source, kinds, i, state_type)
            random = state_type == STATES_BF16 or (not preparing and is_stochastic(kinds[i][STORAGE_OF]))
            key = chunk_key(row, seed_low, seed_high, step, begin, random)
            chunk = (at, codes, key, begin, size, made, factor.to(tl.float32))
            whole = in_vectors(joined, size, block)
            if preparing:
                a, b = prepare_chunk(chunk, whole, kinds, i, state_type, block)
                tl.store(partials + 2 * number, a)
                tl.store(partials + 2 * number + 1, b)
            else:
                for start in range(0, whole, block):
                    update_block(chunk, start, kinds, i, state_type, block, True)
                for start in range(whole, size, block):
                    update_block(chunk, start, kinds, i, state_type, block, False)
                if kinds[i][RULE_OF + CARRIED]:
                    tl.debug_barrier()  # the parameter is read again as it was stored
                    after = param_squares(at[0], at[1], kinds[i][STORAGE_OF], begin, size, block)
                    tl.store(partials + 2 * number, after)
                if unscale:
                    tl.debug_barrier()  # every warp has read the gradient
                    unscale_chunk(at[2], grad_scale, kinds[i][TYPE_OF], begin, size, block)
