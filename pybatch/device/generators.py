"""The global generators of random numbers that dropout and initial parameters draw from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the CPU's and, of a GPU, its own.

    `torch.manual_seed` keeps the stack it was called from for each kind of accelerator that is not in use: to print
    three stacks takes longer than the step of a small model.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def seed_all(seed: int) -> None:
    """Seed what a model may draw from wherever it is made, also on a GPU that it is the first to use."""
    if torch.backends.cuda.is_built() and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.manual_seed(seed)  # which a GPU's generators take over when CUDA begins
        return
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


def place_in_use() -> torch.device:
    """The current GPU where CUDA has begun, else the CPU: for what may draw on either."""
    begun: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.device("cuda", torch.cuda.current_device()) if begun else torch.device("cpu")


def forked(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Within it the generators of the CPU and of `device` go their own way; they are put back."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """`forked`, and seeded."""
    with forked(device):
        seed_generators(seed, device)
        yield
