"""pybatch: what batch size, on how many devices, and what does going further cost?

This is the catalogue of what a user may touch. Names are loaded when first used, so that reading saved records needs
no torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pybatch.base import display

if TYPE_CHECKING:
    from pybatch.answer.changes import compare as compare
    from pybatch.answer.plan import plan_accumulation as plan_accumulation
    from pybatch.answer.verdict import advise as advise
    from pybatch.branch.measurement import measure_branches as measure_branches
    from pybatch.capacity.measurement import measure_capacity as measure_capacity
    from pybatch.fits.steps import fit_steps as fit_steps
    from pybatch.fits.steps_csv import fit_steps_csv as fit_steps_csv
    from pybatch.fits.throughput import fit_throughput as fit_throughput
    from pybatch.jobs.watch import watch as watch
    from pybatch.noise.measurement import measure_noise as measure_noise
    from pybatch.records import Capacity as Capacity
    from pybatch.records import Convergence as Convergence
    from pybatch.records import NoiseScale as NoiseScale
    from pybatch.records import Run as Run
    from pybatch.records import StepsFit as StepsFit
    from pybatch.records import ThroughputFit as ThroughputFit
    from pybatch.records import Verdict as Verdict
    from pybatch.report.formats.html import write_report as write_report
    from pybatch.sweep.measurement import measure_convergence as measure_convergence
    from pybatch.workloads.base import Workload as Workload

_HOME = {
    "Capacity": "pybatch.records",
    "Convergence": "pybatch.records",
    "NoiseScale": "pybatch.records",
    "Run": "pybatch.records",
    "StepsFit": "pybatch.records",
    "ThroughputFit": "pybatch.records",
    "Verdict": "pybatch.records",
    "Workload": "pybatch.workloads.base",
    "advise": "pybatch.answer.verdict",
    "compare": "pybatch.answer.changes",
    "fit_steps": "pybatch.fits.steps",
    "fit_steps_csv": "pybatch.fits.steps_csv",
    "fit_throughput": "pybatch.fits.throughput",
    "measure_branches": "pybatch.branch.measurement",
    "measure_capacity": "pybatch.capacity.measurement",
    "measure_convergence": "pybatch.sweep.measurement",
    "measure_noise": "pybatch.noise.measurement",
    "plan_accumulation": "pybatch.answer.plan",
    "watch": "pybatch.jobs.watch",
    "write_report": "pybatch.report.formats.html",
}

_ROOMS = ("integrations", "noise", "optim", "schedule")  # whose names users write out: pybatch.noise.attach

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"pybatch.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'pybatch' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def _html(record: object) -> str:
    """A record for a notebook; what makes the HTML is imported when one is first shown."""
    html: str = importlib.import_module("pybatch.report.formats.notebook").render(record)
    return html


def _text(record: object) -> str:
    """A record for `print`, likewise."""
    text: str = importlib.import_module("pybatch.report.formats.text").printed(record)
    return text


display.show_with(_html, _text)


class _Catalogue(ModuleType):
    """This module: a public name stays what it is where the import system binds a room of that name here."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Catalogue


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_ROOMS})
