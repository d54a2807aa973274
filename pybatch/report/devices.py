"""Steps on several devices, and the communication fitted to them."""

from __future__ import annotations

from pybatch.base import numerals as n
from pybatch.records import Distributed, DistributedPoint
from pybatch.report.layout import Section, details_of, notes_of, table


def section(found: Distributed) -> Section:
    """A row a number of devices and batch size, then the fit."""
    said = []
    if found.fit is not None:
        fit = found.fit
        rate = n.rate(fit.bandwidth_bytes_per_s, "B/s")
        said.append(("all-reduce", f"{rate}, {n.number(1e6 * fit.latency_s)} µs a message"))
        misfit = f"misses the measured steps by {n.share(fit.rms_log_error)} (rms)"
        said.append(("overlap", f"gamma {n.number(fit.gamma)} (1: none, large: full); the fit {misfit}"))
    steps = table(DistributedPoint, found.points)
    return Section(
        f"Several devices ({found.backend})",
        steps,
        tuple(said),
        notes=notes_of(found.notes),
        details=details_of(found.notes),
    )
