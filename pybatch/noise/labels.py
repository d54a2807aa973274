"""Labels that a loss leaves out: its mean is then over fewer tokens in some examples than in others."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from pybatch.records import Note

IGNORED = -100  # the label that torch's losses leave out where nothing else is said


def ignored_in(values: Any) -> bool:
    """Whether a tensor of whole numbers among these holds the ignore index. Waits for the device."""
    return any(isinstance(leaf, torch.Tensor) and _holds(leaf) for leaf in tree_leaves(values))


def _holds(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and bool((tensor == IGNORED).any())


def ragged(remedy: str, index: int = IGNORED) -> Note:
    """Said of a mean over tokens whose numbers differ, where examples were counted alike."""
    text = (
        f"labels hold the ignore index {index}: the loss is a mean over tokens, of which examples have different "
        f"numbers, and they were counted alike, so the scale is distorted. Say how many each has, by {remedy}"
    )
    return Note("noise.b_simple", text)
