"""Whether a training waits for its data, which no batch size helps: said before all else."""

from __future__ import annotations

from dataclasses import replace

from pybatch.base.numerals import counted, share
from pybatch.records import Inputs, Reason, Training, Verdict

# Share of the time, from which on data comes before the batch size; of all that a script does between steps, where no
# DataLoader tells what of it is waiting for data.
WAITS, WAITS_OR_WORKS = 0.10, 0.25
LEAST_MS = 1.0  # between steps, where no DataLoader is: less goes on calls of Python


def with_input(verdict: Verdict, training: Training | None, cores: int | None = None) -> Verdict:
    """The verdict on a training that was watched.

    Args:
        verdict: on its noise and its device.
        training: where the time of its steps goes.
        cores: of the machine, for workers.
    """
    if training is None or training.waiting is None:
        return verdict
    if training.workers is not None:
        waits = training.waiting >= WAITS
    else:
        waits = training.waiting >= WAITS_OR_WORKS and training.waiting * (training.step_ms or 0.0) >= LEAST_MS
    if not waits:
        return verdict
    whom = "for data" if training.workers is not None else "for data, or for what else the script does between steps,"
    sentence = f"The device waits {whom} {share(training.waiting)} of the time: {_remedy(training, cores)}"
    because = f"{sentence}; a larger batch helps nothing before that. {verdict.because}".strip()
    rest = verdict.text.removeprefix(verdict.answer).strip().removeprefix(verdict.because).strip()
    inputs: Inputs = {
        "waiting": training.waiting,
        "workers": None if training.workers is None else float(training.workers),
        "workers_needed": None if training.workers_needed is None else float(training.workers_needed),
    }
    reason = Reason("limit", sentence, "measured", inputs)
    return replace(
        verdict,
        limit="input",
        because=because,
        text=" ".join(part for part in (verdict.answer, because, rest) if part),
        reasons=(*(r for r in verdict.reasons if r.figure != "limit"), reason),
    )


def _remedy(training: Training, cores: int | None) -> str:
    needed, now = training.workers_needed, training.workers
    if needed is None:
        return "load batches ahead, in a DataLoader with workers"
    have = "it has none" if not now else f"it has {now}"
    scarce = f", and there are {counted(cores, 'core')}: make examples cheaper" if cores and needed > cores else ""
    return f"{counted(needed, 'worker')} would do ({have}){scarce}"
