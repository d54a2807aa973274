"""How much a reader may stake on the advised batch: by what it may cost, and by what it stands on."""

from __future__ import annotations

from pybatch.answer.best import DISTURBED, Best
from pybatch.answer.critical import Critical
from pybatch.base.numerals import count, number
from pybatch.records import Capacity, Confidence

SURE, FAIR = 1.10, 1.35  # regret not passed in 95 % of what is possible: of high and of medium confidence
_LEVELS = ("high", "medium", "low")
_STANDS = {
    "sweep": "steps to the target were measured",
    "branch": "branched runs alone",
    "noise": "a noise scale alone",
}


def confidence_of(critical: Critical, best: Best | None, capacity: Capacity | None) -> Confidence | None:
    """The level and its reasons, the weightiest first; None where no batch is advised."""
    if best is None or capacity is None or capacity.model is None:
        return None
    found: list[tuple[int, str]] = []
    if critical.disagreement is not None:
        found.append((1 if critical.source == "sweep" else 2, "the evidence disagrees"))
    if capacity.model.rms_log_error > DISTURBED:
        missed = number(100 * capacity.model.rms_log_error, 2)
        found.append((2, f"measure again: step times miss any smooth curve by {missed} %"))
    if capacity.disturbed:
        found.append((2, f"machine disturbed: {capacity.disturbed[0]}"))
    if best.cut is not None:
        found.append((2, f"runs past batch {count(best.cut)} did not reach the target"))
    if critical.source != "sweep":
        stands = _STANDS[critical.source or "noise"]
        if critical.bounded:
            stands = "a noise scale within a sweep's bound" if critical.source == "noise" else stands
        elif critical.unheard:
            stands = f"{stands}: the sweep gives no critical batch"
        found.append((1, stands))
    if best.extrapolated:
        found.append((1, best.extrapolated))
    tail = best.regret[1]
    if round(tail, 2) > SURE:  # as it is told
        text = f"the batch advised may take up to {number(tail, 3)} times the least time"
        found.append((2 if tail > FAIR else 1, text))
    found.sort(key=lambda pair: -pair[0])
    level = max((worth for worth, _ in found), default=0)
    reasons = tuple(text for _, text in found) or (_STANDS["sweep"],)
    return Confidence(_LEVELS[level], reasons)  # type: ignore[arg-type]
