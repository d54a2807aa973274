"""Fused optimizers: drop-in for `torch.optim`, with clipping and noise statistics in the same pass."""

from pybatch.optim.adamw import AdamW
from pybatch.optim.base import FusedOptimizer
from pybatch.optim.sgd import SGD

__all__ = ["SGD", "AdamW", "FusedOptimizer"]
