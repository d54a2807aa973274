"""Records that a page must stand: hostile names, samples."""

import dataclasses

from pybatch.fits.steps import fit_steps
from pybatch.records import (
    Anchor,
    ConvergencePoint,
    Curve,
    Note,
    RateSteps,
)

HOSTILE = '</script><img src=x onerror="document.title=1"><a href="http://example.org">&amp;'


def hostile(run):
    workload = dataclasses.replace(run.capacity.workload, name=HOSTILE, unit=HOSTILE, model=HOSTILE)
    device = dataclasses.replace(run.capacity.device, name=HOSTILE)
    capacity = dataclasses.replace(run.capacity, workload=workload, device=device, notes=(Note("x", HOSTILE),))
    return dataclasses.replace(run, capacity=capacity)


def with_samples(run):
    """Step times spread evenly from 0.9 to 1.5 of the median, and an anchor that became a tenth slower."""
    shape = (0.9, 0.92, 0.97, 1.0, 1.1, 1.4, 1.5)
    points = tuple(
        dataclasses.replace(p, step_ms_quantiles=tuple(p.step_ms * s for s in shape)) if p.status == "ok" else p
        for p in run.capacity.batches
    )
    anchor = Anchor(8, tuple(2.8 * s for s in shape), tuple(1.1 * 2.8 * s for s in shape))
    return dataclasses.replace(run, capacity=dataclasses.replace(run.capacity, batches=points, anchor=anchor))


def curve(rule="tuned"):
    """Perfect hyperbola, one rate that diverges and one that is too slow; the largest batch fails."""
    made = []
    for batch in (8, 16, 32, 64, 128):
        steps = 50 * (1 + 40 / batch)
        rates = (
            RateSteps(0.01, (None, None), ("not_reached", "not_reached")),
            RateSteps(0.1, (steps - 1, steps + 1), ("reached", "reached")),
            RateSteps(1.0, (None, None), ("diverged", "diverged")),
        )
        made.append(ConvergencePoint(batch, steps, "reached", 2, 0.1, reached=2, rates=rates))
    made.append(ConvergencePoint(256, None, "diverged", 2, None, diverged=2))
    fit = fit_steps([p.batch for p in made[:-1]], [p.steps for p in made[:-1]])
    return Curve(rule, "train", tuple(made), fit.s_min, fit.critical_batch, fit.low, fit.high, target=0.1, fit=fit)
