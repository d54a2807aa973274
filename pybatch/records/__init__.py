"""Frozen records of every result, and their JSON.

One versioned schema, the same on CPU and GPU. A figure that could not be measured is None (JSON null), and a `Note`
in the same section names the figure and the reason. Nothing here imports torch: saved JSON is read anywhere.
"""

from pybatch.records.capacity import (
    QUANTILES,
    Anchor,
    BatchPoint,
    BatchStatus,
    Capacity,
    CommunicationFit,
    Distributed,
    DistributedPoint,
    StepLimit,
    StepMode,
    ThroughputFit,
)
from pybatch.records.convergence import (
    Branching,
    BranchPoint,
    Convergence,
    ConvergencePoint,
    Curve,
    PointStatus,
    RateSteps,
    StepsFit,
    aim_of,
)
from pybatch.records.input import InputPipeline, InputRate
from pybatch.records.noise import (
    CountedNoise,
    LayerNoise,
    NoisePoint,
    NoiseScale,
    NoiseStatus,
    NoiseTrajectory,
    WeightedNoise,
)
from pybatch.records.run import SCHEMA, Run, to_dict
from pybatch.records.schedule import Schedule, ScheduleSource, Stage
from pybatch.records.subject import Ceilings, Device, Environment, Note, WorkloadInfo
from pybatch.records.training import Training
from pybatch.records.verdict import (
    AccumulationPlan,
    Confidence,
    Evidence,
    FrontierPoint,
    Inputs,
    Kind,
    Level,
    Limit,
    Reading,
    Reason,
    Verdict,
)

__all__ = [
    "QUANTILES",
    "SCHEMA",
    "AccumulationPlan",
    "Anchor",
    "BatchPoint",
    "BatchStatus",
    "BranchPoint",
    "Branching",
    "Capacity",
    "Ceilings",
    "CommunicationFit",
    "Confidence",
    "Convergence",
    "ConvergencePoint",
    "CountedNoise",
    "Curve",
    "Device",
    "Distributed",
    "DistributedPoint",
    "Environment",
    "Evidence",
    "FrontierPoint",
    "InputPipeline",
    "InputRate",
    "Inputs",
    "Kind",
    "LayerNoise",
    "Level",
    "Limit",
    "NoisePoint",
    "NoiseScale",
    "NoiseStatus",
    "NoiseTrajectory",
    "Note",
    "PointStatus",
    "RateSteps",
    "Reading",
    "Reason",
    "Run",
    "Schedule",
    "ScheduleSource",
    "Stage",
    "StepLimit",
    "StepMode",
    "StepsFit",
    "ThroughputFit",
    "Training",
    "Verdict",
    "WeightedNoise",
    "WorkloadInfo",
    "aim_of",
    "to_dict",
]
