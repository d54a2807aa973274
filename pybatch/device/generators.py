"""The global generators of random numbers that dropout and initial parameters draw from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the CPU's and, of a GPU, its own.

    `torch.manual_seed` keeps every call, with the stack it came from, for each kind of accelerator that is not in use:
    three stacks printed a call, which take longer than the step of a small model, and are never let go of.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def forked(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Within it the generators of the CPU and of `device` go their own way; they are put back."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """`forked`, and seeded."""
    with forked(device):
        seed_generators(seed, device)
        yield
