"""Step time on several devices: how computing and communicating overlap.

T = (T_c^gamma + T_n^gamma)^(1/gamma) with gamma = 1 for one after the other and gamma -> infinity for full overlap
(Pollux: Qiao et al. 2021, eq. 9). T_c is the time to compute a device's own share; T_n a ring all-reduce of the
gradient, 2 (K - 1) / K bytes / bandwidth + 2 (K - 1) latency. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pybatch.base.errors import UsageError
from pybatch.records import CommunicationFit, DistributedPoint

_MOST_GAMMA = 32.0  # beyond it the sum is the maximum to 2 %: full overlap


@dataclass(frozen=True)
class AllReduce:
    """One measured all-reduce."""

    devices: int
    bytes: int
    seconds: float


def fit_communication(
    points: Sequence[DistributedPoint], reduces: Sequence[AllReduce], bytes_: int
) -> CommunicationFit:
    """Bandwidth and latency from all-reduces alone, then the overlap from whole steps.

    Args:
        points: steps on two or more devices, with the time of the same computation without communication.
        reduces: all-reduces of two or more sizes.
        bytes_: of the gradient that a step reduces.

    Raises:
        UsageError: no point on several devices, or fewer than two all-reduces.
    """
    from scipy.optimize import minimize_scalar, nnls  # takes long to import, for what only several devices need

    several = [p for p in points if p.devices > 1]
    if not several or len(reduces) < 2:
        raise UsageError(
            f"{len(several)} steps on several devices and {len(reduces)} all-reduces: the fit needs 1 and 2 at least."
        )
    # Relative errors count: each row is divided by its time.
    rows = np.array([[2 * (r.devices - 1) / r.devices * r.bytes, 2 * (r.devices - 1)] for r in reduces], dtype=float)
    seconds = np.array([r.seconds for r in reduces])
    (inverse, latency), _ = nnls(rows / seconds[:, None], np.ones(len(reduces)))
    bandwidth = float(1 / inverse) if inverse > 0 else None
    compute = np.array([p.compute_ms for p in several]) / 1e3
    step = np.array([p.step_ms for p in several]) / 1e3
    network = np.array([_network(p.devices, bytes_, bandwidth, latency) for p in several])

    def error(log_gamma: float) -> float:
        return float(np.mean((np.log(step) - np.log(_overlapped(compute, network, math.exp(log_gamma)))) ** 2))

    found = minimize_scalar(error, bounds=(0.0, math.log(_MOST_GAMMA)), method="bounded")
    gamma = min((1.0, math.exp(found.x), _MOST_GAMMA), key=lambda g: error(math.log(g)))
    return CommunicationFit(
        gamma=gamma,
        bandwidth_bytes_per_s=bandwidth,
        latency_s=float(latency),
        bytes=bytes_,
        rms_log_error=math.sqrt(error(math.log(gamma))),
        devices=max(p.devices for p in several),
    )


def step_s(fit: CommunicationFit, compute_s: Any, devices: Any) -> Any:
    """Modelled seconds per step on so many devices, each computing for `compute_s`; numbers or arrays of them."""
    network = _network(devices, fit.bytes, fit.bandwidth_bytes_per_s, fit.latency_s)
    return _overlapped(compute_s, network, fit.gamma)


def _network(devices: Any, bytes_: float, bandwidth: float | None, latency: float) -> Any:
    transfer = 2 * (devices - 1) / devices * bytes_ / bandwidth if bandwidth else 0.0
    return transfer + 2 * (devices - 1) * latency


def _overlapped(compute: Any, network: Any, gamma: float) -> Any:
    # Scaled by the larger one: powers of microseconds underflow.
    most = np.maximum(compute, network)
    return most * ((compute / most) ** gamma + (network / most) ** gamma) ** (1 / gamma)
