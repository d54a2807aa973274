"""The learning rate at the advised batch: the one tuned there, or by the optimizer's rule from a rate in use."""

from __future__ import annotations

import math

from pybatch.base.numerals import number
from pybatch.records import Capacity, Convergence, Inputs, NoiseScale, Reason
from pybatch.scaling import SEARCHED

# Rules by optimizer: linear for plain gradients while batches are below the critical one (Goyal et al. 2017), then the
# square root, as for those that divide by the gradient's own size (Malladi et al. 2022).
_LINEAR = ("sgd",)
_FACTORS = {
    "linear": "batch ratio",
    "sqrt": "sqrt(batch ratio)",
    "linear, then sqrt": "batch ratio up to the critical batch, and its square root from there",
}
FAR = 4.0  # times: rates of one batch size tuned by different seeds or targets differ by less


def rate_of(
    batch: int, critical: float, capacity: Capacity | None, steps: Convergence | None
) -> tuple[float | None, Reason | None]:
    """The rate, and how it came about; None where no rate is known at any batch."""
    tuned = _tuned(steps)
    work = (capacity.workload if capacity is not None else None) or (steps.workload if steps is not None else None)
    if tuned:
        base = min(tuned, key=lambda b: abs(math.log(b / batch)))
        rate, origin = tuned[base], f"tuned at batch {base}"
    elif work is not None and work.learning_rate and work.reference_batch:
        base, rate, origin = work.reference_batch, work.learning_rate, f"in use at batch {work.reference_batch}"
    else:
        return None, None
    inputs: Inputs = {"base_rate": rate, "base_batch": float(base)}
    if base == batch:
        return rate, Reason("learning_rate", f"the rate {origin}", "measured" if tuned else "assumed", inputs)
    optimizer = (steps.optimizer if steps is not None else None) or (work.optimizer if work else None)
    factor, rule = _scaled(optimizer or "adamw", base, batch, critical)
    kind = optimizer or "optimizers like Adam"
    text = f"{number(rate)} {origin}, times the {_FACTORS[rule]}: a rule of thumb for {kind}, not measured; "
    return rate * factor, Reason("learning_rate", f"{text}tune around it", "assumed", inputs | {"rule": rule})


def _scaled(optimizer: str, base: int, batch: int, critical: float) -> tuple[float, str]:
    """The factor of the rate from one batch to another, and the rule: linear, as far as it goes, up to the critical."""
    bend = min(max(critical, min(base, batch)), max(base, batch)) if optimizer.lower() in _LINEAR else min(base, batch)
    steep, flat = (bend / min(base, batch), max(base, batch) / bend)
    factor = float(steep * math.sqrt(flat))
    rule = "sqrt" if steep == 1 else "linear" if flat == 1 else "linear, then sqrt"
    return (factor if batch > base else 1 / factor), rule


def far_from_tuned(
    capacity: Capacity | None, noise: NoiseScale | None, steps: Convergence | None, critical: float
) -> str | None:
    """Said where the noise scale was read in a training whose rate is far from the one that a search found best.

    Of the same optimizer, and at about the same batch size: nothing is said of a rate that nobody searched.
    """
    work, rate = capacity.workload if capacity is not None else None, noise.learning_rate if noise is not None else None
    found = _tuned(steps) or _branched(steps)
    if work is None or not work.reference_batch or not rate or not found:
        return None
    if steps is None or steps.optimizer is None or steps.optimizer.lower() != (work.optimizer or "").lower():
        return None
    batch = work.reference_batch
    base = min(found, key=lambda b: abs(math.log(b / batch)))
    if not 0.5 <= base / batch <= 2.0:
        return None
    best = found[base] * _scaled(steps.optimizer, base, batch, critical)[0]
    if 1 / FAR < best / rate < FAR:
        return None
    off = f"{number(best / rate)} times below" if best > rate else f"{number(rate / best)} times above"
    return (
        f"read in a training at the rate {rate:.3g} at batch {batch}, {off} what a search found best, "
        f"{found[base]:.3g} at batch {base}: the noise scale is that of another training. Give --lr {best:.3g}"
    )


def _branched(steps: Convergence | None) -> dict[int, float]:
    """Rates of the base branches where these were searched, by batch size; of several checkpoints the last one's."""
    searched = [at for at in steps.branches if at.tuned] if steps is not None else []
    return {p.batch: p.learning_rate for at in searched for p in at.points if p.batch == at.base_batch}


def _tuned(steps: Convergence | None) -> dict[int, float]:
    """Rates that a search found best, by batch size, on the training loss if there is a choice."""
    curves = [c for c in steps.curves if c.rule == SEARCHED] if steps is not None else []
    curve = min(curves, key=lambda c: c.split != "train", default=None)
    points = curve.points if curve is not None else ()
    return {p.batch: p.learning_rate for p in points if p.status == "reached" and p.learning_rate}
