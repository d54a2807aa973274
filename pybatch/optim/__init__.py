"""Fused optimizers: drop-in for `torch.optim`, with clipping and noise statistics in the same pass."""

from pybatch.optim._engine.base import FusedOptimizer
from pybatch.optim.adam import Adam
from pybatch.optim.adamw import AdamW
from pybatch.optim.adan import Adan
from pybatch.optim.lamb import LAMB
from pybatch.optim.lars import LARS
from pybatch.optim.lion import Lion
from pybatch.optim.muon import Muon
from pybatch.optim.nadam import NAdam
from pybatch.optim.sgd import SGD

__all__ = ["LAMB", "LARS", "SGD", "Adam", "AdamW", "Adan", "FusedOptimizer", "Lion", "Muon", "NAdam"]
