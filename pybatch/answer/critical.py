"""The critical batch by the best evidence there is: a sweep, then branches, then the noise scale."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pybatch.answer.time_model import Inputs
from pybatch.records import Convergence, Curve, NoiseScale, Note, Reason, StepsFit
from pybatch.scaling import SEARCHED


@dataclass(frozen=True)
class Critical:
    """The critical batch with the evidence it stands on. Without a value, `low` or `high` may bound it."""

    value: float | None
    low: float | None
    high: float | None
    source: str | None
    reason: Reason
    curve: Curve | None = None  # steps to target, where they were measured
    shape: StepsFit | None = None  # the curve steps follow, where it is known and no hyperbola


def shaped(fit: StepsFit | None) -> StepsFit | None:
    """The fit, where it has a curve that the critical batch alone does not give."""
    if fit is None or fit.model in (None, "hyperbola") or not (fit.parameters and fit.critical_batch):
        return None
    return fit


def critical_of(noise: NoiseScale | None, steps: Convergence | None) -> Critical:
    """The critical batch by the best evidence there is: a sweep, then branches, then the noise scale.

    A bound that was measured goes before a value that is modelled.
    """
    return _from_steps(steps) or _from_branches(steps) or _from_noise(noise)


def _from_steps(steps: Convergence | None) -> Critical | None:
    """The critical batch of the best-tuned curve that has one, on the training loss if there is a choice.

    Where no tuned curve bends within the batches tested, the bound that this gives: it says more of the problem than
    the value of a rule whose rate fails at large batches.
    """
    curves = steps.curves if steps else ()
    known = [c for c in curves if not (c.critical_batch is None and c.low is None and c.high is None)]
    if not known:
        return None
    curve = min(known, key=lambda c: (c.rule != SEARCHED, c.critical_batch is None, c.split != "train"))
    what = f"measured steps to the {curve.split} loss target, learning-rate rule {curve.rule!r}"
    text = f"fitted to {what}"
    if curve.critical_batch is None:
        text = f"{what}, show no bend between the smallest and the largest batch tested, which bounds it"
    inputs: Inputs = {"target": curve.target, "s_min": curve.s_min, "points": len(curve.points)}
    if curve.fit is not None:
        inputs["model"] = curve.fit.model
    reason = Reason("critical_batch", text, "measured", inputs)
    return Critical(curve.critical_batch, curve.low, curve.high, "sweep", reason, curve, shaped(curve.fit))


def _from_branches(steps: Convergence | None) -> Critical | None:
    """The critical batch at the last checkpoint that has one: it grows along training, and most of a run lies there."""
    known = [b for b in steps.branches if b.fit and (b.fit.critical_batch or b.fit.low or b.fit.high)] if steps else []
    if not known:
        return None
    last = known[-1]
    assert last.fit is not None
    text = f"fitted to the steps that branches from step {last.step} take to a common loss"
    inputs: Inputs = {"step": last.step, "level": last.level, "window": last.window, "points": len(last.points)}
    reason = Reason("critical_batch", text, "measured", inputs)
    fit = last.fit
    return Critical(fit.critical_batch, fit.low, fit.high, "branch", reason, shape=shaped(fit))


def _from_noise(noise: NoiseScale | None) -> Critical:
    if noise is None:
        reason = Reason("critical_batch", "neither the noise scale nor steps to a target were measured", "measured")
        return Critical(None, None, None, None, reason)
    inputs: Inputs = {
        "grad_sq": noise.grad_sq,
        "trace": noise.trace,
        "pairs": noise.steps,
        "warmup_steps": noise.warmup_steps,
    }
    if noise.unit is not None:
        text = f"the noise scale is in {noise.unit}, batch sizes are not. Give noise.in_examples(mean per example)"
        return Critical(None, None, None, None, Reason("critical_batch", text, "measured", inputs))
    if noise.counted is not None:
        inputs[f"{noise.counted.unit} per example"] = noise.counted.per_example
    if noise.status == "resolved" and noise.b_simple is not None:
        # The identification is the model; across McCandlish's tasks the ratio of the two runs from 0.05 to 8.
        text = (
            "the gradient noise scale tr(Sigma) / |G|^2, taken for the critical batch; on published tasks the two "
            "differed by up to 20 times"
        )
        return Critical(
            noise.b_simple, noise.low, noise.high, "noise", Reason("critical_batch", text, "modelled", inputs)
        )
    why = next((n.text for n in noise.notes if n.figure == "noise.b_simple"), "the noise scale is not resolved")
    reason = Reason("critical_batch", why, "measured", inputs)
    bound = noise.low if noise.status == "lower_bound" else None
    return Critical(None, bound, None, "noise" if bound is not None else None, reason)


def passed_over(steps: Convergence | None, source: str | None) -> list[Note]:
    """What was measured and yet says nothing of the critical batch, so that weaker evidence stands in for it.

    Args:
        steps: the sweep, or the branches.
        source: of the critical batch, as `critical_of` chose it.
    """
    if steps is None or source == "sweep":
        return []
    instead = {"branch": "the branches stand", "noise": "the noise scale stands"}.get(source or "", "nothing stands")
    lacking: list[tuple[str, tuple[Note, ...]]] = []
    if steps.curves:
        lacking.append(("the sweep gives", steps.curves[0].notes))
    if source != "branch" and (steps.branches or not steps.curves):
        own = steps.branches[-1] if steps.branches else None
        fit = own.fit.notes if own is not None and own.fit is not None else ()
        cut = tuple(note for note in steps.notes if note.figure == "branches")
        lacking.append(("the branches give", (*(own.notes if own is not None else ()), *fit, *cut)))
    return [
        Note("verdict.critical_source", f"{what} no critical batch{_why(notes)}: {instead} in for it")
        for what, notes in lacking
    ]


def _why(notes: Sequence[Note]) -> str:
    """In brackets, the note on the critical batch, or else the first one."""
    own = [note for note in notes if note.figure in ("critical_batch", "points", "branches")]
    found = min(own, key=lambda note: note.figure != "critical_batch", default=None)
    return f" ({found.text.rstrip('.')})" if found is not None else ""


def with_noise_ratio(curve: Curve, noise: NoiseScale | None) -> Curve:
    """B_simple over the critical batch, by this noise scale; a curve keeps its own where this one has no value.

    Errors of the two are independent, added in quadrature in logarithms.
    """
    if noise is None or noise.b_simple is None or not curve.critical_batch:
        return curve
    if noise.unit is not None:
        text = f"the noise scale is in {noise.unit}, batch sizes are not. Give noise.in_examples(mean per example)"
        note = Note("noise_ratio", text)
        return curve if note in curve.notes else dataclasses.replace(curve, notes=(*curve.notes, note))
    ratio = noise.b_simple / curve.critical_batch
    low = _distance(noise.b_simple, noise.low, curve.high, curve.critical_batch)
    high = _distance(noise.high, noise.b_simple, curve.critical_batch, curve.low)
    return dataclasses.replace(
        curve,
        noise_ratio=ratio,
        noise_ratio_low=ratio / math.exp(low) if low is not None else None,
        noise_ratio_high=ratio * math.exp(high) if high is not None else None,
    )


def _distance(a: float | None, b: float | None, c: float | None, d: float | None) -> float | None:
    """hypot(ln(a / b), ln(c / d)), or None where an end is open."""
    if not (a and b and c and d):
        return None
    return math.hypot(math.log(a / b), math.log(c / d))
