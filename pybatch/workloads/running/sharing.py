"""The process that a user's code shares with pybatch: what that code may set, what is put back, what is refused.

While a file is imported and its class constructed, numerical settings (threads, precision, determinism, default dtype)
are the user's to make: they hold, and the record has them. Folder, arguments, signal handlers, environment, random
generators, default device and streams are put back, and so is what was taken from the path of imports. Later, in the
middle of a run, a change of any of these is an error.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from pybatch.device.environment import VARIABLES
from pybatch.device.settings import numerical

_STREAMS = ("sys.stdout", "sys.stderr")  # that results and progress go to
_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # that pybatch listens to
_FIRST = 1  # calls of a method that are looked at
_STEADY = ("folder", "sys.argv", "torch.num_threads", "torch.default_dtype", "torch.default_device")
_LATER = 0.5  # s between looks after them

State = Mapping[Any, Any]


@contextlib.contextmanager
def put_back(file: str) -> Iterator[None]:
    """In this context user code, of this file, is imported or constructed, as if it were run without arguments."""
    environ, before = dict(os.environ), state()
    seeds = random.getstate(), np.random.get_state(), torch.get_rng_state()
    own, sys.argv = sys.argv, [file]  # pybatch's arguments are none of the file's
    try:
        yield
    finally:
        sys.argv = own
        for name in {*environ, *os.environ} - set(VARIABLES):  # those are numerical settings, and recorded
            _set_variable(name, environ.get(name))
        _restore(before, ("folder", "sys.path", *_STREAMS, *_SIGNALS, "torch.default_device"))
        random.setstate(seeds[0])
        np.random.set_state(seeds[1])
        torch.set_rng_state(seeds[2])


class Lookout:
    """Looks at calls of a workload's methods for changes of what they share: the first ones, and then seldom."""

    def __init__(self) -> None:
        self._calls: dict[str, int] = {}
        self._next = 0.0
        self._seen: State = {}  # at the last look, of what pybatch itself leaves alone

    def before(self, method: str) -> State | None:
        """The state, where this call is to be looked at."""
        calls = self._calls.get(method, 0)
        if calls >= _FIRST and time.perf_counter() < self._next:
            return None
        self._calls[method] = calls + 1
        return {**state(), **self._seen}  # so that a change since the last look, in a call between, is found

    def changed(self, before: State, method: str) -> str | None:
        """What the call has changed, in words; it is put back."""
        self._next = time.perf_counter() + _LATER
        free = ("seed of torch's generator",) if method == "model" else ()  # it is drawn beside the generator
        found, now = changes(before, free), state()
        self._seen = {name: now[name] for name in _STEADY}
        return found


def changes(before: State, free: tuple[str, ...] = ()) -> str | None:
    """What differs from an earlier state, in words, but for what is free to change; it is put back."""
    now = state()
    found = [name for name in before if _differs(name, before[name], now[name]) and name not in free]
    if not found:
        return None
    _restore(before, found)
    return ", ".join(f"{_named(name)} (from {_said(before[name])} to {_said(now[name])})" for name in found)


def _differs(name: Any, before: Any, now: Any) -> bool:
    """Whether it has changed; folders may be added to the path of imports."""
    return not set(before) <= set(now) if name == "sys.path" else bool(before != now)


def state() -> State:
    """What user code may change for everybody in this process; seeds and settings by value."""
    return {
        "folder": _folder(),
        "sys.argv": list(sys.argv),
        "sys.path": list(sys.path),
        **{name: getattr(sys, name.removeprefix("sys.")) for name in _STREAMS},
        **{number: signal.getsignal(number) for number in _SIGNALS},
        **numerical(),
        "torch.num_threads": torch.get_num_threads(),
        "torch.grad_enabled": torch.is_grad_enabled(),
        "seed of torch's generator": torch.initial_seed(),
        **{f"${name}": os.environ.get(name) for name in VARIABLES},
    }


def _restore(before: State, names: Any) -> None:
    for name in names:
        value = before[name]
        if name == "folder" and value is not None and _folder() != value:
            os.chdir(value)
        elif name == "sys.argv" and sys.argv != value:
            sys.argv[:] = value
        elif name == "sys.path":
            added = [folder for folder in sys.path if folder not in value]
            sys.path[:] = [*added, *value] if _differs(name, value, sys.path) else sys.path
        elif name in _STREAMS:
            setattr(sys, name.removeprefix("sys."), value)
        elif isinstance(name, signal.Signals) and signal.getsignal(name) != value and value is not None:
            with contextlib.suppress(ValueError):  # handlers are the main thread's, which then put it there
                signal.signal(name, value)
        elif name == "torch.default_device" and str(torch.get_default_device()) != value:
            torch.set_default_device(None if value == "cpu" else value)
        elif name == "torch.grad_enabled":
            torch.set_grad_enabled(value)
        elif name == "torch.num_threads":
            torch.set_num_threads(value)
        elif name == "torch.float32_matmul_precision":
            torch.set_float32_matmul_precision(value)
        elif name == "torch.deterministic_algorithms":
            torch.use_deterministic_algorithms(value != "False", warn_only=value == "warn only")
        elif name == "torch.default_dtype":
            torch.set_default_dtype(getattr(torch, value))
        elif isinstance(name, str) and name.startswith("$"):
            _set_variable(name[1:], value)


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    elif os.environ.get(name) != value:
        os.environ[name] = value


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it is gone
        return None


def _named(name: Any) -> str:
    if isinstance(name, signal.Signals):
        return f"the handler of {name.name}"
    return "the folder" if name == "folder" else str(name)


def _said(value: Any) -> str:
    text = value if isinstance(value, str) else getattr(value, "__name__", None) or repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
