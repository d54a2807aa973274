"""Triton twin of table.h: its numbers as constants, read from the compiled module."""

import triton
import triton.language as tl

from pybatch.ops.compiled import RULES, core


def constants(numbers, *names):
    """Of a dictionary of numbers those of these names, in this order, as a kernel takes them."""
    return tuple(tl.constexpr(numbers[name]) for name in names)


def hyper_columns(rule, *names):
    """The columns of a rule's own hyper-parameters, in the order in which they are named here."""
    return constants(RULES[rule].hyper, *names)


PARAM, GRAD, SUM, MASTER, NUMEL, CODE = constants(core.columns, "param", "grad", "sum", "master", "numel", "code")
GRAD_TYPE, GROUP, FRESH, SALT = constants(core.columns, "grad_type", "group", "fresh", "salt")
STATE, SCALE = constants(core.columns, "state", "scale")
COLUMNS = tl.constexpr(core.column_count)
FLOAT32, BFLOAT16 = constants(core.storages, "float32", "bfloat16")  # storages and types of gradients
BFLOAT16_MASTER, BFLOAT16_REMAINDER = constants(core.storages, "bfloat16_master", "bfloat16_remainder")
BFLOAT16_STOCHASTIC = tl.constexpr(core.storages["bfloat16_stochastic"])
# Where this build's compiler has no fp16 no row has these numbers.
FLOAT16, FLOAT16_MASTER, FLOAT16_STOCHASTIC = (
    tl.constexpr(core.storages.get(name, -1)) for name in ("float16", "float16_master", "float16_stochastic")
)
STORAGES = tl.constexpr(core.storage_count)
STATES_FP32, STATES_BF16, STATES_8BIT = constants(core.state_types, "fp32", "bf16", "8bit")
STATE_BLOCK = tl.constexpr(core.state_block)
SUM_SQ, BAD, MICRO_SQ, NORM, CLIP = constants(core.ledger, "sum_sq", "bad", "micro_sq", "norm", "clip")
SKIPPED, SKIP, PAIRS = constants(core.ledger, "skipped", "skip", "pairs")
SMALL_SUM, LARGE_SUM = constants(core.ledger, "small_sum", "large_sum")
RING_STEPS, RING_LENGTH = constants(core.ledger, "ring_steps", "ring_length")
RING_ROWS, LAYER_BLOCKS, LAYER_SIZE = (tl.constexpr(n) for n in (core.ring_rows, core.layer_blocks, core.layer_size))
LAYER_MICRO_SQ, LAYER_SUM_SQ, LAYER_RING = constants(core.layer, "micro_sq", "sum_sq", "ring")
PARAM_SQ, DIRECTION_SQ = constants(core.row_norms, "param_sq", "direction_sq")
ROW_NORMS = tl.constexpr(core.row_norm_count)
LR, MAXIMIZE = constants(core.hyper, "lr", "maximize")
HYPER_COLUMNS = tl.constexpr(core.hyper_columns)
# Said at every launch, because the default changes in Triton 3.10.
LAUNCH = {"enable_fp_fusion": True}


@triton.jit
def power(base, exponent):
    """base ** exponent in float64, for 0 <= base < 1."""
    return tl.exp2(exponent * tl.log2(base))


@triton.jit
def finite(x):
    """Neither infinite nor NaN, of any float."""
    return x - x == 0.0


@triton.jit
def contains(numbers: tl.constexpr, number):
    """Whether a tuple of constants holds the number."""
    found = number < 0
    for i in tl.static_range(len(numbers)):
        found = found | (number == numbers[i])
    return found


@triton.jit
def row_sums(partials, starts, row, block: tl.constexpr):
    """Both sums of a row's chunks, in a fixed order."""
    lanes = tl.arange(0, block)
    first, second = tl.zeros((block,), tl.float64), tl.zeros((block,), tl.float64)
    end = tl.load(starts + row + 1)
    for start in range(tl.load(starts + row), end, block):
        chunk = start + lanes
        first += tl.load(partials + 2 * chunk, mask=chunk < end, other=0.0)
        second += tl.load(partials + 2 * chunk + 1, mask=chunk < end, other=0.0)
    return tl.sum(first), tl.sum(second)
