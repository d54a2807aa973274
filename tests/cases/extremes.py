"""Gradients at the ends of fp32, and what every backend must make of them: norm, clip coefficient, skip."""

import math

import torch
from cases import lists

MAX_NORM = 3.0
# What some elements of an otherwise ordinary gradient are, or all of it.
SOME = {
    "inf": [math.inf],
    "-inf": [-math.inf],
    "nan": [math.nan],
    "inf and nan": [math.inf, math.nan],
    "1e20": [1e20],  # finite, and so is its square in float64 alone
    "-1e20": [-1e20, 1e20],
    "largest": [torch.finfo(torch.float32).max],
    "subnormal among others": [1e-42],
}
ALL = {"1e20 everywhere": 1e20, "1e-20 everywhere": 1e-20, "1e-30 everywhere": 1e-30, "subnormal": 1e-42, "zero": 0.0}
NAMES = (*SOME, *ALL)


def draw(name, counts, dtype=torch.float32, seed=3):
    """Gradients of these sizes; the special elements stand first, in the middle and last, over several tensors."""
    grads = lists.draw(counts, seed=seed)
    if name in ALL:
        grads = [g.sign() * ALL[name] for g in grads]
    else:
        places = [(-1, -1), (0, 0), (-1, len(grads[-1]) // 2), (4, 5)]  # (tensor, element)
        for (tensor, element), value in zip(places, SOME[name], strict=False):
            grads[tensor][element] = value
    return [g.to(dtype) for g in grads]


def expected(grads):
    """(norm, clip coefficient, skipped) in float64: torch's `clip_grad_norm_`, and a GradScaler's verdict."""
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in grads))
    ratio = MAX_NORM / (norm + 1e-6)
    return norm, ratio if ratio < 1.0 else 1.0, not math.isfinite(norm)


def check(made, name, dtype=torch.float32, accumulated=False):
    """A good step, then a last one on such a gradient; raises AssertionError where the verdict is not the expected one.

    Returns what the step left in the ledger: (norm, clip, skip).
    """
    counts = [len(p) for p in made.params]
    made.step(lists.draw(counts, seed=1), norm=True, clip=True, max_norm=MAX_NORM)
    before, grads = made.bits(), draw(name, counts, dtype)
    if accumulated:
        made.accumulate(grads, 4.0, first=True)
        made.step([None] * len(counts), sum=True, known=True, clip=True, max_norm=MAX_NORM)
    else:
        made.step(grads, norm=True, clip=True, max_norm=MAX_NORM)
    norm, clip, skipped = expected(grads)
    found = tuple(float(made.ledger[key]) for key in ("norm", "clip", "skip"))
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64),
        torch.tensor((norm, clip, float(skipped)), dtype=torch.float64),
        rtol=1e-6,
        atol=0.0,
        equal_nan=True,
        msg=lambda text: f"{name}: {found}, expected {(norm, clip, skipped)}: {text}",
    )
    assert float(made.ledger["skipped"]) == float(skipped)
    moved = [not torch.equal(a, b) for a, b in zip(before, made.bits(), strict=True)]
    assert any(moved) != skipped
    if not skipped:
        assert all(bool(p.isfinite().all()) for p in made.values())
    return found
