"""What speaks against the times that a verdict on a watched training stands on: said before the rest."""

from __future__ import annotations

from dataclasses import replace

from pybatch.base.numerals import number
from pybatch.records import Capacity, Training, Verdict

_DIFFERENT = 1.3  # a script's own step over that of its replay, or the other way round


def with_doubts(verdict: Verdict, capacity: Capacity, replayed: Training | None) -> Verdict:
    """The verdict, which tells in its first lines of a disturbed machine, and of a replay that takes another time.

    Args:
        verdict, capacity: of a training that was watched.
        replayed: the training; None where its last pass was not run again.
    """
    found, told = [], f"{verdict.answer} {verdict.because}"
    if capacity.disturbed and capacity.disturbed[0] not in told:
        remedy = "" if "easure again" in told else ": measure again"
        found.append(f"The machine was disturbed ({capacity.disturbed[0]}){remedy}.")
    both = step_and_replay(capacity, replayed) if replayed is not None else None
    if both is not None and max(both) > _DIFFERENT * min(both):
        own, again = (number(value) for value in both)
        found.append(
            f"Forward, backward and update took {own} ms in the script and {again} ms in the replay at the same "
            "batch: gains by other batch sizes may be as far off."
        )
    if not found:
        return verdict
    rest = verdict.text.removeprefix(verdict.answer).strip().removeprefix(verdict.because).strip()
    because = " ".join(part for part in (*found, verdict.because) if part)
    text = " ".join(part for part in (verdict.answer, because, rest) if part)
    return replace(verdict, because=because, text=text)


def step_and_replay(capacity: Capacity, training: Training) -> tuple[float, float] | None:
    """Milliseconds of one pass and an update in the script, and in the replay at the same batch; None where not known.

    The script's has its loss in it, which the replay has not.
    """
    parts = (training.forward, training.backward, training.update)
    if training.step_ms is None or training.micro_batch is None or training.accumulation is None or None in parts:
        return None
    batch = training.micro_batch * training.devices
    replayed = next((p.step_ms for p in capacity.batches if p.batch == batch and p.step_ms is not None), None)
    if replayed is None:
        return None
    forward, backward, update = (float(part or 0.0) for part in parts)
    return training.step_ms * ((forward + backward) / training.accumulation + update), replayed
