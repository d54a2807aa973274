"""How the batch that a watched script has itself does, beside the best rate timed and the batch advised."""

from __future__ import annotations

from dataclasses import replace

from pybatch.answer.frontier import change
from pybatch.answer.verdict import ensemble
from pybatch.base.numerals import count, number, share
from pybatch.records import Capacity, Inputs, NoiseScale, Reason, Training, Verdict

_LONGER = 1.05  # times the time of the batch advised; less is no difference that shows
_TIMES = ("time_factor", "time_factor_low", "time_factor_high")


def with_own(verdict: Verdict, capacity: Capacity, noise: NoiseScale | None, training: Training) -> Verdict:
    """The verdict, which says so in one sentence behind its answer; unchanged where the own batch was not replayed.

    Args:
        verdict: on both sides.
        capacity: of the replays.
        noise: of the training.
        training: whose batch it is. Of one of several passes a step the rate of a pass is told alone: the batch of
            the step was timed as one pass, which is not how the script makes it.
    """
    rates = {p.batch: p.samples_per_s for p in capacity.batches if p.status == "ok" and p.samples_per_s}
    one = (training.micro_batch or 0) * training.devices
    if one not in rates or len(rates) < 2:
        return verdict
    fastest = max(rates, key=lambda batch: rates[batch])
    part, whole = rates[one] / rates[fastest], training.accumulation == 1
    inputs: Inputs = {"batch": float(one), "rate_percent": 100 * part, "fastest_batch": float(fastest)}
    subject = f"The script's own batch {count(one)}" if whole else f"The script's own passes of {count(one)}"
    sentence = f"{subject} {'has' if whole else 'have'} "
    sentence += "the best rate timed" if one == fastest else f"{share(part)} of the best rate timed ({count(fastest)})"
    model = ensemble(capacity, noise, None) if verdict.best_batch is not None and whole else None
    if model is not None and verdict.best_batch == one:
        sentence += ", and is the one advised"
    elif model is not None and verdict.best_batch is not None:
        cost = change(model, float(verdict.best_batch), float(one), capacity.batches)
        inputs |= {name: cost[name] for name in _TIMES}
        times, low, high = (number(float(cost[name] or 0.0), 2) for name in _TIMES)
        longer = f"{times} times ({low} to {high})" if float(cost["time_factor"] or 0.0) > _LONGER else "about"
        sentence += f", and takes {longer} the time of batch {count(verdict.best_batch)} to the same loss"
    sentence += "."
    rest = verdict.text.removeprefix(verdict.answer).strip()
    reason = Reason("own_batch", sentence, "modelled" if "time_factor" in inputs else "measured", inputs)
    return replace(
        verdict,
        because=f"{sentence} {verdict.because}".strip(),
        text=" ".join(text for text in (verdict.answer, sentence, rest) if text),
        reasons=(*verdict.reasons, reason),
    )
