"""Points of a sweep made by hand."""

import dataclasses

from pybatch.answer.claims import check_claims
from pybatch.records import (
    Convergence,
    ConvergencePoint,
    Curve,
    RateSteps,
    Run,
    StepsFit,
)


def point(batch, steps, reached=3, **changes):
    status = changes.pop("status", "reached" if steps is not None else "not_reached")
    rate = changes.pop("rate", 0.5)
    rates = (RateSteps(0.5, (steps,) * 3, (status,) * 3), RateSteps(1.0, (None,) * 3, ("diverged",) * 3))
    return ConvergencePoint(batch, steps, status, 3, rate, reached=reached, rates=rates, **changes)


def curve(rule, points, split="train", low=40.0, high=60.0, **fit):
    fitted = StepsFit("hyperbola", 100.0, 50.0, low, high, 10.0, 50.0, 200.0, b_stag_low=150.0, b_stag_high=260.0)
    fitted = dataclasses.replace(fitted, **fit)
    return Curve(rule, split, tuple(points), 100.0, 50.0, low, high, target=0.1, fit=fitted)


def claims(*curves, measured=None, base=8):
    run = Run("", None, measured, convergence=Convergence(tuple(curves), base_batch=base))
    return {claim.name: claim for claim in check_claims(run)}
