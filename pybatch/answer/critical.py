"""The critical batch: which curve, branches and noise scale speak of it, and what they say together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

from pybatch.answer.evidence import FACTORS, LEAST, LOSS_POWER, NORMAL, Weighed, combined, with_bound
from pybatch.base.numerals import batch_size, count, number
from pybatch.fits.solver import Array
from pybatch.records import (
    Branching,
    Convergence,
    Curve,
    Inputs,
    Kind,
    NoiseScale,
    Note,
    Reading,
    Reason,
    StepsFit,
    aim_of,
)
from pybatch.scaling import LOGGED, SEARCHED

_FURTHEST = 0.01  # of the target: the law is not followed further back
PAST = 0.8  # of the target: a train loss below it is past the target


@dataclass(frozen=True)
class Critical:
    """The critical batch with the evidence it stands on. Without a value, `low` or `high` may bound it."""

    value: float | None
    low: float | None
    high: float | None
    source: str | None  # the strongest evidence among it: "sweep", "branch" or "noise"
    reason: Reason
    curve: Curve | None = None  # steps to target, where they were measured
    shape: StepsFit | None = None  # the curve that steps follow, where it is known
    weighed: Weighed | None = None  # behind a value
    prediction: tuple[float, float] | None = None  # a value and the error of its logarithm, by all but the curve
    within: tuple[float, float] = (0.0, math.inf)  # bounds that a sweep measured
    reached: int | None = None  # largest batch of a tuned sweep that reached, where a larger one did not
    unheard: bool = False  # whether a sweep was made that says nothing of it
    checkpoint: str = ""  # a sentence: which of the checkpoints branched from it is of, where a reader can't tell

    @property
    def bounded(self) -> bool:
        """Whether a sweep bounds it."""
        return self.within != (0.0, math.inf)

    @property
    def disagreement(self) -> str | None:
        return self.weighed.disagreement if self.weighed is not None else None

    def drawn(self, normal: Array) -> Array:
        """Logarithms of the critical batch as it may be, for standard normal draws of any shape."""
        assert self.weighed is not None
        assert self.value is not None
        return _truncated(self.weighed, self.within, normal)


def critical_of(noise: NoiseScale | None, steps: Convergence | None, target: float | None = None) -> Critical:
    """The critical batch by all evidence there is, weighed by what each piece stands for.

    A value stands within the bounds that a sweep measured; bounds alone give none.

    Args:
        noise, steps: the evidence.
        target: train loss that the run is to reach, where it is known.
    """
    found = _critical_of(noise, steps, target)
    swept = steps is not None and bool(steps.curves)
    unheard = swept and found.source in ("noise", None) and not found.bounded
    checkpoint = _checkpoint(steps, target) if found.source == "branch" else ""
    return dataclasses.replace(found, reached=_reached(steps), unheard=unheard, checkpoint=checkpoint)


def _reached(steps: Convergence | None) -> int | None:
    """The largest batch size whose tuned runs reached a target, where those made at a larger one did not."""
    curves = [c for c in (steps.curves if steps else ()) if c.rule in (SEARCHED, LOGGED)]
    for curve in sorted(curves, key=lambda c: c.split != "train"):
        reached = max((p.batch for p in curve.points if p.status == "reached"), default=None)
        if reached is not None:
            return reached if any(p.batch > reached and p.status == "not_reached" for p in curve.points) else None
    return None


def _critical_of(noise: NoiseScale | None, steps: Convergence | None, target: float | None) -> Critical:
    curve, branch = curve_of(steps), _branch_of(steps, target)
    bound = curve if curve is not None and curve.critical_batch is None else None
    weighed = combined(
        [r for r in (_by_curve(curve), _by_branch(branch, target), _by_noise(noise, target)) if r is not None]
    )
    if weighed is not None:
        for reading, side in _bounds_beside(noise, branch, target):
            weighed = with_bound(weighed, reading, side)
    if bound is not None and (weighed is None or bound.rule == SEARCHED):
        within = (bound.low or 0.0, bound.high if bound.high is not None else math.inf)
        if weighed is None:
            return Critical(None, bound.low, bound.high, "sweep", _reason_of_curve(bound), bound, within=within)
        if _mass(weighed, within) < 0.05:
            against = _against(weighed, within)
            reason = _reason_of_curve(bound)
            reason = dataclasses.replace(reason, inputs=reason.inputs | {r.words: r.value for r in weighed.readings})
            return Critical(None, bound.low, bound.high, "sweep", reason, bound, weighed=against, within=within)
        return _valued(weighed, noise, bound, branch, target, within)
    if weighed is not None:
        return _valued(weighed, noise, curve, branch, target)
    if branch is not None and branch.fit is not None:
        return Critical(None, branch.fit.low, branch.fit.high, "branch", _reason_of_branch(branch, target))
    return _unread(noise, steps)


def _valued(
    weighed: Weighed,
    noise: NoiseScale | None,
    curve: Curve | None,
    branch: Branching | None,
    target: float | None,
    within: tuple[float, float] = (0.0, math.inf),
) -> Critical:
    """A critical batch with a value."""
    used = weighed.readings
    source = min((r.source for r in used), key=("sweep", "branch", "noise").index)
    reason = {
        "sweep": lambda: _reason_of_curve(curve),
        "branch": lambda: _reason_of_branch(branch, target),
        "noise": lambda: _reason_of_noise(noise, used[-1]),
    }[source]()
    if len(used) > 1 or weighed.aside:
        others = [r for r in (*used, *weighed.aside) if r.source != source]
        text = f"{reason.text}; weighed with " + " and ".join(
            f"{r.words} {batch_size(r.value)}{' (set aside)' * (r in weighed.aside)}" for r in others
        )
        more: Inputs = {r.words: r.value for r in (*used, *weighed.aside)}
        reason = dataclasses.replace(reason, text=text, inputs=reason.inputs | more)
    if weighed.bound is not None:
        reason = dataclasses.replace(
            reason, inputs=reason.inputs | {f"{weighed.bound.words}, bound": weighed.bound.value}
        )
    if within != (0.0, math.inf):
        ends = [f"{side} {batch_size(end)}" for side, end in _ends(within)]
        reason = dataclasses.replace(reason, text=f"{reason.text}; within the sweep's bound: {' and '.join(ends)}")
    value, (low, high) = weighed.value, _interval(weighed)
    if within != (0.0, math.inf):
        low, value, high = (float(v) for v in np.exp(_truncated(weighed, within, np.array([-NORMAL, 0.0, NORMAL]))))
    shape = shaped(curve.fit if curve is not None else None) if source == "sweep" else None
    rest = combined([r for r in used if r.source != "sweep"]) if source == "sweep" else None
    prediction = (max(rest.value, LEAST), (rest.down + rest.up) / 2) if rest is not None else None
    return Critical(value, low, high, source, reason, curve, shape, weighed, prediction, within)


def _interval(weighed: Weighed) -> tuple[float | None, float | None]:
    """95 % interval: of one reading that stands for itself its own, else by the errors."""
    [first, *more] = weighed.readings
    if not more and first.factor == 1.0:
        return first.low, first.high
    if weighed.value <= LEAST:  # no noise to speak of
        return 0.0, max(LEAST, first.high or 0.0) * first.factor
    if not more and (first.low is None or first.high is None):
        ends = (first.low and first.low / first.factor, first.high and first.high * first.factor)
        return ends[0], ends[1]
    value = weighed.value
    return value * math.exp(-NORMAL * weighed.down), value * math.exp(NORMAL * weighed.up)


def _against(weighed: Weighed, within: tuple[float, float]) -> Weighed:
    """Readings that a sweep's bound leaves no room for: set aside, and told."""
    figures = " and ".join(f"{r.words} {batch_size(r.value)}" for r in weighed.readings)
    ends = " and ".join(f"{side} {batch_size(end)}" for side, end in _ends(within))
    text = f"The evidence disagrees on the critical batch: the sweep {ends} and {figures}; the sweep stands."
    return dataclasses.replace(weighed, readings=(), aside=weighed.readings, disagreement=text)


def _ends(within: tuple[float, float]) -> list[tuple[str, float]]:
    low, high = within
    return [("at least", low)] * (low > 0) + [("at most", high)] * math.isfinite(high)


def _mass(weighed: Weighed, within: tuple[float, float]) -> float:
    """Probability of these bounds by these readings."""
    low, high = (ndtr(_standard(weighed, end)) for end in within)
    return float(high - low)


def _truncated(weighed: Weighed, within: tuple[float, float], normal: Array) -> Array:
    """ln of the critical batch by the readings, within bounds, at standard normal quantiles."""
    low, high = (ndtr(_standard(weighed, end)) for end in within)
    z = ndtri(low + (high - low) * ndtr(normal))
    found: Array = math.log(max(weighed.value, LEAST)) + np.where(z < 0, weighed.down, weighed.up) * z
    return found


def _standard(weighed: Weighed, end: float) -> float:
    """A bound in standard deviations of ln from the value."""
    if end <= 0 or math.isinf(end):
        return math.copysign(math.inf, end - 1)
    log = math.log(end / max(weighed.value, LEAST))
    return log / (weighed.down if log < 0 else weighed.up)


def shaped(fit: StepsFit | None) -> StepsFit | None:
    """The fit, where it has a curve with a critical batch."""
    if fit is None or fit.model is None or not (fit.parameters and fit.critical_batch):
        return None
    return fit


def curve_of(steps: Convergence | None) -> Curve | None:
    """The best-tuned curve that says anything of the critical batch, on the training loss if there is a choice.

    Where no tuned curve bends within the batches tested, the bound that this gives: it says more of the problem than
    the value of a rule whose rate fails at large batches.
    """
    curves = steps.curves if steps else ()
    known = [c for c in curves if not (c.critical_batch is None and c.low is None and c.high is None)]
    return min(known, key=lambda c: (c.rule != SEARCHED, c.critical_batch is None, c.split != "train"), default=None)


def _branch_of(steps: Convergence | None, target: float | None) -> Branching | None:
    """The last checkpoint that says anything: the critical batch grows along training, and most of a run lies there.

    Of those up to the target, where it is known; past it lies nothing of the run.
    """
    known = [b for b in steps.branches if b.fit and (b.fit.critical_batch or b.fit.low or b.fit.high)] if steps else []
    within = [b for b in known if _past(b, target) is None]
    return within[-1] if within else known[0] if known else None


def _checkpoint(steps: Convergence | None, target: float | None) -> str:
    branch = _branch_of(steps, target)
    if steps is None or branch is None or branch.fit is None:
        return ""
    read, loss = f"The branches' reading is of step {count(branch.step)}", _past(branch, target)
    if loss is not None:
        how = f"they {'begin at' if loss == branch.loss else 'go on to'} loss {number(loss)}, past the target of"
        found = branch.fit.critical_batch
        if found and loss >= 0:  # bounds stand as they are
            return f"{read}, where it is {batch_size(found)}: {how} {number(target)}, and it is taken back to it."
        return f"{read}: {how} {number(target)}."
    if target is not None and branch.level is not None and branch.level > target:
        text = f"its steps are to loss {number(branch.level)}, as branches were not soon enough at the target of"
        return f"{read}: {text} {number(target)}."
    if len(steps.branches) < 2:
        return ""
    later = [at for at in steps.branches if at.step > branch.step]
    past = [at for at in later if _past(at, target) is not None]
    which = f"the last checkpoint{' up to the target' * bool(past)}{' that tells' * (len(later) > len(past))}"
    return f"{read}, {which}."


def _past(branch: Branching, target: float | None) -> float | None:
    """The train loss past the target that branches begin at, or count their steps to; None where they do not."""
    if target is None:
        return None
    if branch.loss is not None and branch.loss < target:
        return branch.loss
    return branch.level if branch.level is not None and 0 <= branch.level < PAST * target else None


def _by_curve(curve: Curve | None) -> Reading | None:
    if curve is None or curve.critical_batch is None:
        return None
    kind: Kind = "sweep" if curve.rule in (SEARCHED, LOGGED) else "rule"
    return Reading("sweep", kind, curve.critical_batch, curve.low, curve.high, FACTORS[kind])


def _by_branch(branch: Branching | None, target: float | None) -> Reading | None:
    fit = branch.fit if branch is not None else None
    if branch is None or fit is None or not fit.critical_batch:
        return None
    kind, back = _kind_of_branch(branch, target)
    low, high = (end * back if end is not None else None for end in (fit.low, fit.high))
    return Reading("branch", kind, fit.critical_batch * back, low, high, FACTORS[kind])


def _kind_of_branch(branch: Branching, target: float | None) -> tuple[Kind, float]:
    """What branches are as evidence, and what takes them back to the target."""
    if target is not None and (loss := _past(branch, target)) is not None:
        return "branch past target", _taken_back(loss, target) if loss >= 0 else 1.0
    return "tuned branch" if branch.tuned else "branch", 1.0


def _bounds_beside(
    noise: NoiseScale | None, branch: Branching | None, target: float | None
) -> list[tuple[Reading, int]]:
    """Evidence that bounds the critical batch from below (1) or from above (-1) and has no value for it."""
    found: list[tuple[Reading, int]] = []
    fit = branch.fit if branch is not None else None
    if branch is not None and fit is not None and not fit.critical_batch:
        kind, back = _kind_of_branch(branch, target)
        ends = [(end * back, side) for end, side in ((fit.low, 1), (fit.high, -1)) if end]
        found += [(Reading("branch", kind, end, None, None, FACTORS[kind]), side) for end, side in ends]
    if noise is not None and noise.unit is None and noise.misled is None and noise.status == "lower_bound":
        kind, back = _kind_of_noise(noise, target)
        if noise.low:
            found.append((Reading("noise", kind, noise.low * back, None, None, FACTORS[kind]), 1))
    return found


def _taken_back(loss: float, target: float) -> float:
    """What a critical batch at a loss past the target is times, to be that of a run to it."""
    back: float = max(loss / target, _FURTHEST) ** LOSS_POWER
    return back


def _by_noise(noise: NoiseScale | None, target: float | None) -> Reading | None:
    if noise is None or noise.unit is not None or noise.misled is not None:
        return None
    if noise.status != "resolved" or noise.b_simple is None:
        return None
    kind, back = _kind_of_noise(noise, target)
    low, high = (end * back if end is not None else None for end in (noise.low, noise.high))
    return Reading("noise", kind, noise.b_simple * back, low, high, FACTORS[kind])


def _kind_of_noise(noise: NoiseScale, target: float | None) -> tuple[Kind, float]:
    if target is not None and noise.loss is not None and 0 <= noise.loss < PAST * target:
        return "noise past target", _taken_back(noise.loss, target)
    return "noise", 1.0


def _reason_of_curve(curve: Curve | None) -> Reason:
    assert curve is not None
    what = f"measured steps to the {aim_of(curve.split)} target, learning-rate rule {curve.rule!r}"
    text = f"fitted to {what}"
    if curve.critical_batch is None:
        text = f"{what}, show no bend between the smallest and the largest batch tested, which bounds it"
    inputs: Inputs = {"target": curve.target, "s_min": curve.s_min, "points": len(curve.points)}
    if curve.fit is not None:
        inputs["model"] = curve.fit.model
    return Reason("critical_batch", text, "measured", inputs)


def _reason_of_branch(branch: Branching | None, target: float | None) -> Reason:
    assert branch is not None
    aim = "the target" if branch.level is not None and branch.level == target else "a common loss"
    text = f"fitted to the steps that branches from step {branch.step} take to {aim}"
    if (loss := _past(branch, target)) is not None:
        how = "begin at" if loss == branch.loss else "go on to"
        text = f"{text}; they {how} train loss {number(loss)}, past the target"
        if branch.fit is not None and branch.fit.critical_batch:  # bounds stand as they are
            text = f"{text}, and are taken back to it"
    inputs: Inputs = {"step": branch.step, "level": branch.level, "window": branch.window, "points": len(branch.points)}
    return Reason("critical_batch", text, "measured", inputs)


def _inputs_of_noise(noise: NoiseScale) -> Inputs:
    inputs: Inputs = {"grad_sq": noise.grad_sq, "trace": noise.trace, "pairs": noise.steps}
    inputs["warmup_steps"] = noise.warmup_steps
    if noise.counted is not None:
        inputs[f"{noise.counted.unit} per example"] = noise.counted.per_example
    return inputs


def _reason_of_noise(noise: NoiseScale | None, reading: Reading) -> Reason:
    assert noise is not None
    text = (
        "the gradient noise scale tr(Sigma) / |G|^2, taken for the critical batch, from which it was off by up to "
        f"{FACTORS['noise']:g} times either way on most published tasks"
    )
    if reading.kind == "noise past target":
        text = f"{text}; it was read at train loss {number(noise.loss)}, past the target, and is taken back to it"
    inputs = _inputs_of_noise(noise) | {"b_simple": noise.b_simple, "loss": noise.loss, "factor": reading.factor}
    return Reason("critical_batch", text, "modelled", inputs)


def _unread(noise: NoiseScale | None, steps: Convergence | None) -> Critical:
    """No value: why, and the bound that a noise scale may give."""
    if noise is None:
        why = "neither the noise scale nor steps to a target were measured"
        if lacking := _lacking(steps, None):
            why = f"{' and '.join(f'{what} none{_why(notes)}' for what, notes in lacking)}; no noise scale was measured"
        return Critical(None, None, None, None, Reason("critical_batch", why, "measured"))
    inputs = _inputs_of_noise(noise)
    if noise.unit is not None:
        text = f"the noise scale is in {noise.unit}, batch sizes are not. Give noise.in_examples(mean per example)"
        return Critical(None, None, None, None, Reason("critical_batch", text, "measured", inputs))
    if noise.misled is not None:
        inputs["misled"] = "by the loss"
        return Critical(None, None, None, None, Reason("critical_batch", noise.misled, "measured", inputs))
    why = next((n.text for n in noise.notes if n.figure == "noise.b_simple"), "the noise scale is not resolved")
    reason = Reason("critical_batch", why, "measured", inputs)
    bound = noise.low if noise.status == "lower_bound" else None
    return Critical(None, bound, None, "noise" if bound is not None else None, reason)


_TELLING = ("critical_batch", "points", "branches")  # figures whose notes say why there is no critical batch


def passed_over(steps: Convergence | None, source: str | None, bounded: bool = False) -> list[Note]:
    """What was measured and yet says nothing of the critical batch, so that weaker evidence stands in for it.

    Args:
        steps: the sweep, or the branches.
        source: of the critical batch, as `critical_of` chose it.
        bounded: whether the sweep bounds it.
    """
    instead = {"branch": "the branches stand", "noise": "the noise scale stands"}.get(source or "", "nothing stands")
    told = []
    for what, notes in _lacking(steps, source):
        gives, how = ("no critical batch", "in for it")
        if bounded and what.startswith("the sweep"):
            gives, how = ("a bound alone", "within it")
        told.append(Note("verdict.critical_source", f"{what} {gives}{_why(notes)}: {instead} {how}"))
    return told


def _lacking(steps: Convergence | None, source: str | None) -> list[tuple[str, tuple[Note, ...]]]:
    """What gives no critical batch though it was measured, and its notes on that."""
    lacking: list[tuple[str, tuple[Note, ...]]] = []
    if steps is None or source == "sweep":
        return lacking
    if steps.curves:
        lacking.append(("the sweep gives", steps.curves[0].notes))
    if source != "branch" and (steps.branches or not steps.curves):
        own = steps.branches[-1] if steps.branches else None
        fit = own.fit.notes if own is not None and own.fit is not None else ()
        cut = tuple(note for note in steps.notes if note.figure == "branches")
        lacking.append(("the branches give", (*(own.notes if own is not None else ()), *fit, *cut)))
    return lacking


def unmeasured(steps: Convergence | None, source: str | None) -> str | None:
    """Why a sweep that was made has no critical batch; None where it, or branches, have one, or none was made."""
    if steps is None or not steps.curves or source in ("sweep", "branch"):
        return None
    texts = {figure: [n.text for n in steps.curves[0].notes if n.figure == figure] for figure in _TELLING}
    found = next((own for own in texts.values() if own), ["Too few batch sizes reached the target"])
    return ". ".join(text[:1].upper() + text[1:].rstrip(".") for text in found) + "."


def _why(notes: Sequence[Note]) -> str:
    """In brackets, the note on the critical batch, or else the first one."""
    own = [note for note in notes if note.figure in _TELLING]
    found = min(own, key=lambda note: note.figure != _TELLING[0], default=None)
    return f" ({found.text.rstrip('.')})" if found is not None else ""


def with_noise_ratio(curve: Curve, noise: NoiseScale | None) -> Curve:
    """B_simple over the critical batch, by this noise scale; a curve keeps its own where this one has no value.

    Errors of the two are independent, added in quadrature in logarithms.
    """
    if noise is None or noise.b_simple is None or noise.misled is not None or not curve.critical_batch:
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
