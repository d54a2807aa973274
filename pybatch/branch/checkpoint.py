"""Checkpoints of a training run: tensors and plain numbers, loaded without running code from the file."""

from __future__ import annotations

import contextlib
import pickle
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from pybatch.base.errors import UsageError

FORMAT = "pybatch checkpoint 1"
_SUFFIX = ".part"  # of a checkpoint that is being written
_OLD = 3600.0  # s
_ANEW = "Delete it, and it is made anew, or name another folder."


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a state of tensors, numbers, text, lists and dicts; in place in one step, so that none is half-written."""
    temporary = path.with_name(path.name + _SUFFIX)
    try:
        torch.save({"format": FORMAT, **state}, temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"checkpoint '{path}' cannot be written: {error.strerror}. Name another folder.") from None


def clear_leftovers(folder: Path) -> None:
    """Take away what processes that were killed while they saved have left in a folder."""
    for left in folder.glob(f"step-*.pt{_SUFFIX}"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _OLD:
                left.unlink()


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, on the CPU. Objects other than tensors and plain values are refused, not built.

    Raises:
        UsageError: a missing, damaged or foreign file, or one that holds anything that would run code.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on what torch does not like about a foreign pickle: it is refused below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"checkpoint '{path}' cannot be read: {error.strerror}. {_ANEW}") from None
    except pickle.UnpicklingError:  # whose text is on arguments of torch.load
        raise UsageError(
            f"checkpoint '{path}' is refused: it holds more than tensors and plain values, or none at all, and was not "
            f"written by 'pybatch branch'. {_ANEW}"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # torch reads a foreign file as a program of its own, which may fail in any way
        why = str(error).splitlines()[0].partition(". ")[0].rstrip(".") if str(error) else type(error).__name__
        raise UsageError(f"checkpoint '{path}' is damaged or no checkpoint ({why}). {_ANEW}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UsageError(f"checkpoint '{path}' was not written by this pybatch. {_ANEW}")
    del state["format"]
    return state
