"""Records made by hand, of which a verdict is known."""

import math
import re

import numpy as np

from pybatch.answer.ensemble import Ensemble
from pybatch.base import numerals
from pybatch.fits.steps_model import predicted
from pybatch.records import (
    BatchPoint,
    Branching,
    BranchPoint,
    Capacity,
    Convergence,
    ConvergencePoint,
    Curve,
    NoiseScale,
    Note,
    StepsFit,
    ThroughputFit,
    WorkloadInfo,
)

BATCHES = tuple(2**i for i in range(13))


def throughput(alpha=0.008, beta=2e-4, floor=None, spread=1.05):
    half = alpha / beta if floor is None else max(floor / (2 * beta), alpha / beta)
    return ThroughputFit(
        model="affine" if floor is None else "floor",
        t0_s=alpha if floor is None else floor,
        alpha_s=alpha,
        beta_s=beta,
        ceiling=1 / beta,
        ceiling_low=1 / beta / spread,
        ceiling_high=1 / beta * spread,
        half_batch=half,
        half_low=half / spread,
        half_high=half * spread,
        saturation_batch=9.5 * half,
        saturation_low=9.5 * half / spread,
        saturation_high=9.5 * half * spread,
        gain=0.05,
        rms_log_error=0.01,
        batches=len(BATCHES),
    )


def capacity(fit=None, max_batch=100_000, examples=None, batches=BATCHES, times=None, error=0.01):
    fit = fit or throughput()
    times = times or [1e3 * fit.step_s(b) for b in batches]
    return Capacity(
        t0_ms=fit.t0_s * 1e3,
        ceiling_samples_per_s=fit.ceiling,
        half_batch=fit.half_batch,
        saturation_batch=fit.saturation_batch,
        saturation_low=fit.saturation_low,
        saturation_high=fit.saturation_high,
        saturation_measured=512,
        max_batch=max_batch,
        max_batch_verified=True,
        model=fit,
        workload=WorkloadInfo("planted", "images", 1000, "fp32", examples=examples),
        batches=tuple(
            BatchPoint(b, "ok", t, t * (1 - error), t * (1 + error), samples_per_s=1e3 * b / t, samples=10)
            for b, t in zip(batches, times, strict=True)
        ),
    )


def exact(fit, critical, most=math.inf, most_global=math.inf, shape=None, communication=None):
    """Times to the loss of which nothing is unknown: one member, on a fine grid."""
    size = np.unique(np.append(np.geomspace(1, 1e8, 12_000), [m for m in (most, most_global) if math.isfinite(m)]))
    steps = 1 + critical / size
    if shape is not None:
        steps = np.array([predicted(shape.model, shape.parameters, b) for b in size])
    times = np.array([fit.step_s(b) for b in size])
    return Ensemble(size, np.log(steps)[None], np.log(times)[None], most, most_global, communication)


def noise(value, low=None, high=None, status="resolved"):
    if status == "resolved" and low is None:
        low, high = value / 1.1, value * 1.1
    notes = () if status == "resolved" else (Note("noise.b_simple", "|G|^2 is not separated from zero"),)
    return NoiseScale(value, low, high, 1.0, value, status, "micro-batches", 100, warmup_steps=200, notes=notes)


def numbers_in(text):
    return re.findall(r"(?<![\w.^|])\d+(?:,\d{3})*(?:\.\d+)?(?![\w^])", text.replace("95 % interval", "interval"))


def unaccounted(verdict):
    """Numbers in the text that stand in no field and in no reason's inputs."""
    known = [getattr(verdict, f) for f in verdict.__dataclass_fields__]
    known += [value for reason in verdict.reasons for value in reason.inputs.values()]
    known += [value for reading in verdict.evidence for value in (reading.value, reading.factor)]
    values = [float(v) for v in known if isinstance(v, int | float)]
    shown = {form for v in values for form in (numerals.count(v), numerals.count(math.ceil(v)))}
    shown |= {numerals.number(v, digits) for v in values for digits in (1, 2, 3)}
    return set(numbers_in(verdict.text)) - shown


def curve(critical, low, high, s_min=500.0):
    model = {(True, False): "inverse", (False, True): "flat"}.get((low is not None, high is not None), "hyperbola")
    bend = critical or (1e9 if low else 1e-9)
    points = tuple(ConvergencePoint(b, s_min * (1 + bend / b), "reached", 3, 0.1, reached=3) for b in BATCHES)
    stagnant = 4 * high if high is not None and model == "flat" else None
    fit = StepsFit(model, s_min if critical else None, critical, low, high, None, critical, None, b_stag_high=stagnant)
    return Curve("tuned", "train", points, fit.s_min, critical, low, high, target=0.3, fit=fit)


SWEEP = {
    "fitted": (curve(200.0, 160.0, 250.0), (200, 160, 250)),
    "lower bound": (curve(None, 4096.0, None), (None, 4096, None)),
    "upper bound": (curve(None, None, 4.0), (None, None, 4)),
    "without a fit": (Curve("tuned", "train", (), None, None, None, None), None),
}


def branching(critical, low, high):
    fit = StepsFit("hyperbola", 100.0, critical, low, high, None, critical, None)
    point = BranchPoint(64, 0.1, (0.5,), (20.0,))
    return Branching(200, 0.6, 64, 4096, 0.55, 0.01, (point,), 256, None, None, fit)


BRANCHES = {"fitted": (branching(600.0, 500.0, 700.0), (600, 500, 700)), "none": (None, None)}


# S_min, B_50 with its ends, and the parameters of each model; E(B_50) is twice the fewest examples, worked out by hand.
MODELS = {
    "power": StepsFit("power", 300.0, 16.1, 13.0, 20.0, None, None, None, parameters={
        "s_min": 300.0, "b_c": 150.0, "alpha": 0.8}),
    "smooth": StepsFit("smooth", 300.0, 150 * math.sqrt(3), 200.0, 330.0, None, None, None, parameters={
        "s_min": 300.0, "b_c": 150.0, "p": 2.0}),
    "u-turn": StepsFit("u-turn", 628.6, 120.8, 100.0, 150.0, None, None, None, parameters={
        "s_min": 300.0, "b_c": 150.0, "b_k": 500.0}),
}  # fmt: skip


def swept_by(fit):
    points = tuple(
        ConvergencePoint(b, predicted(fit.model, fit.parameters, b), "reached", 3, 0.1, reached=3) for b in BATCHES
    )
    made = Curve("tuned", "train", points, fit.s_min, fit.critical_batch, fit.low, fit.high, target=0.3, fit=fit)
    return Convergence((made,))
