"""Other people's trainers and trackers: transformers, Lightning, accelerate; TensorBoard, W&B, CSV. One module each.

Each is imported when it is first named, as each imports its trainer.
"""

from __future__ import annotations

import importlib
from types import ModuleType

_TRAINERS = ("accelerate", "lightning", "transformers", "writers")


def __getattr__(name: str) -> ModuleType:
    if name not in _TRAINERS:
        raise AttributeError(f"module 'pybatch.integrations' has no attribute {name!r}")
    return importlib.import_module(f"pybatch.integrations.{name}")
