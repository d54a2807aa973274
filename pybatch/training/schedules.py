"""How a trial's rate goes along its training, and when its losses are taken. No torch here.

Steps to a target mean the shortest training that ends at it. At a constant rate one run shows them all; under an anneal
every length is a training of its own. Then losses are taken at lengths a quarter apart, each at the end of a whole
training of that length:

- "cosine": trained anew for each length, at the rate 1/2 (1 + cos(pi t / T)) (Loshchilov and Hutter 2017), in all
  5 times the steps.
- "wsd", warm-up, stable, decay: a trunk at the constant rate, from which each length branches off for its last fifth,
  at the rate 1 - sqrt(t / tail) (Haegele et al. 2024, section 3), in all twice the steps.
- "own": trained anew for each length, by the workload's own schedule.

- "average" needs no length: at a constant rate, losses are those of an average over the weights of about the last
  tenth of the steps, (gamma + 1) / (t + gamma) of it new in step t (Shamir and Zhang 2013, section 4), as Zhang et al.
  (2024) take the critical batch by an average in place of an anneal.
"""

from __future__ import annotations

import math

from pybatch.training.trajectory import SPACING

CONSTANT, AVERAGE, COSINE, WSD, OWN = "constant", "average", "cosine", "wsd", "own"
SCHEDULES = {
    CONSTANT: "the rate stays, after a rule's warm-up",
    COSINE: "annealed over the whole length, each length anew",
    WSD: "annealed over the last fifth, from a trunk at the constant rate",
    AVERAGE: "the rate stays; losses of averaged weights",
    OWN: "the workload's schedule(), each length anew",
}
LENGTHS = (COSINE, WSD, OWN)  # under which each length is a training of its own
TAIL = 0.2  # of a length: the decay of "wsd"
GAMMA = 8.0  # of the average: weights are on average steps / (gamma + 2) old
LENGTH_SPACING = 4  # lengths tried while the step number grows by a factor e


def next_length(step: int, schedule: str = CONSTANT) -> int:
    """The step at which losses are taken after those at `step`."""
    return step + max(1, step // (LENGTH_SPACING if schedule in LENGTHS else SPACING))


def tail(length: int) -> int:
    """Steps of a length over which "wsd" decays."""
    return math.ceil(TAIL * length)


def factor(schedule: str, step: int, length: int) -> float:
    """Of the rate in a step of a training of this length, counted from 0."""
    if schedule == COSINE:
        return 0.5 * (1 + math.cos(math.pi * step / length))
    if schedule == WSD:
        into = step - (length - tail(length))
        return 1 - math.sqrt(into / tail(length)) if into > 0 else 1.0
    return 1.0
