"""The noisy quadratic (Zhang et al. 2019): a training problem whose noise scale and steps to target are known exactly.

L(theta) = sum_i h_i theta_i^2 / 2; the gradient of one example is h theta + xi with xi ~ N(0, diag c). After t steps of
SGD at rate a and batch size B, from theta_i = 1: E theta_i^2 = q + (1 - q) a c_i / (B h_i (2 - a h_i)), with
q = (1 - a h_i)^(2t).
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from pybatch.workloads.base import Split, Workload, check_dial, register

Array = NDArray[np.float64]


@register
class Quadratic(Workload):
    """The noisy quadratic: a convex problem whose noise scale and steps to target are known in closed form.

    Curvatures h_i = 1 / i^spectrum, i = 1..d; variances of the gradient noise c_i = noise h_i; every theta_i starts
    at 1. A batch holds the noise xi [n, d] of its examples; that of the test split is zero. The loss's value is L
    itself, its gradient has the noise.
    """

    name = "quadratic"
    unit = "examples"
    target: dict[str, float] = {"train": 0.05}  # noqa: RUF012
    learning_rate = 1e-2
    reference_batch = 16
    dials: ClassVar[dict[str, str]] = {
        "d": "dimensions (100)",
        "spectrum": "curvatures fall as 1 / i^spectrum (1)",
        "noise": "variance of the gradient noise over curvature (1)",
    }

    def __init__(self, *, d: int = 100, spectrum: float = 1.0, noise: float = 1.0) -> None:
        check_dial(self.name, "d", d, 1, 10_000_000, "a whole number from 1 to 10000000")
        check_dial(self.name, "spectrum", spectrum, 0.0, 10.0, "an exponent from 0 to 10")
        check_dial(self.name, "noise", noise, 0.0, 1e12, "a number of at least 0")
        self.options = {"d": d, "spectrum": spectrum, "noise": noise}
        self.h: Array = np.arange(1, d + 1, dtype=np.float64) ** -spectrum
        self.c: Array = noise * self.h
        self._curvature = torch.tensor(self.h, dtype=torch.float32)
        self._deviation = torch.tensor(np.sqrt(self.c), dtype=torch.float32)

    def model(self) -> nn.Module:
        """theta, at 1."""
        return _Point(len(self.h))

    def batch(self, n: int, generator: torch.Generator, split: Split = "train") -> torch.Tensor:
        """The gradient noise xi [n, d] of n examples."""
        xi = torch.randn(n, len(self.h), generator=generator)
        return xi * self._deviation if split == "train" else torch.zeros_like(xi)

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        """L(theta), with the gradient of L + mean xi . theta."""
        theta: torch.Tensor = model(batch).expand_as(batch)  # example by example: so per-example norms see it too
        pull = (batch * theta).sum(-1).mean()
        exact = (self._curvature.to(theta) * theta**2).sum(-1).mean() / 2
        total: torch.Tensor = exact + (pull - pull.detach())
        return total

    def noise_scale(self, theta: ArrayLike | None = None) -> float:
        """B_simple = sum c / sum (h theta)^2, at theta [d] or where training begins."""
        point = np.ones_like(self.h) if theta is None else np.asarray(theta, dtype=np.float64)
        return float(self.c.sum() / ((self.h * point) ** 2).sum())

    def expected_loss(self, steps: ArrayLike, batch: float, rate: ArrayLike) -> Array:
        """E L after so many steps of SGD; steps and rates [...] broadcast."""
        a, t = np.asarray(rate, dtype=np.float64)[..., None], np.asarray(steps, dtype=np.float64)[..., None]
        q = np.abs(1 - a * self.h) ** (2 * t)
        mean: Array = (self.h * q + (1 - q) * a * self.c / (batch * (2 - a * self.h))).sum(-1) / 2
        return mean

    def steps_to_target(self, batch: float, target: float, rates: ArrayLike) -> float:
        """Fewest steps of SGD after which E L is at most the target, over rates [n] in (0, 2 / h_1); or infinity."""
        rate = np.asarray(rates, dtype=np.float64)
        grid = np.unique(np.round(np.geomspace(1, 1e7, 500)))
        first = np.full(len(rate), math.inf)
        low = np.zeros(len(rate))
        for t in grid:  # the loss may rise again, so the first time below is sought going up
            met = (self.expected_loss(t, batch, rate) <= target) & np.isinf(first)
            first[met] = t
            low = np.where(np.isinf(first), t, low)
            if t > first.min():
                break
        found = math.inf
        for a, below, above in zip(rate, low, first, strict=True):
            while math.isfinite(above) and above - below > 1:
                middle = (below + above) // 2
                if self.expected_loss(middle, batch, a) <= target:
                    above = middle
                else:
                    below = middle
            found = min(found, above)
        return float(found)


class _Point(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(d))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """theta [d]."""
        return self.theta
