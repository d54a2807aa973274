"""The gradient noise scale: its estimator and the sources that feed it. Names are loaded when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pybatch.noise.attachment import attach as attach
    from pybatch.noise.trajectory import Trajectory as Trajectory

_HOME = {
    "Trajectory": "pybatch.noise.trajectory",
    "attach": "pybatch.noise.attachment",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pybatch.noise' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
