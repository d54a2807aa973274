"""What `Workload.from_parts` is given, checked before anything is measured, and what kind of loss it is."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, IterableDataset

from pybatch.base.errors import UsageError, unknown

Kind = Literal["criterion", "function"]
_MODELS = ("model", "net", "network", "module")  # first arguments of a loss of (model, batch)
_BATCHES = ("batch", "minibatch", "examples")  # its second ones
_TARGETS = ("target", "targets", "label", "labels", "y_true")  # second arguments of a criterion
_OWN = {  # arguments of a DataLoader that are not free
    "collate_fn": "Give from_parts(collate_fn=).",
    "num_workers": "Give from_parts(num_workers=).",
    **dict.fromkeys(
        ("dataset", "batch_size", "shuffle", "sampler", "batch_sampler"),
        "Leave it out: batches of every size are drawn at random from train.",
    ),
}


def own_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A module as it is now, on the CPU: it may be trained on; UsageError where it cannot be copied."""
    try:
        return copy.deepcopy(module).cpu()
    except Exception as error:
        raise UsageError(
            f"model, a {type(module).__name__}, cannot be copied: {type(error).__name__}: {error}. Give a function "
            "that makes it."
        ) from error


def check_data(which: str, data: Any) -> None:
    """Raise UsageError for data of which examples cannot be drawn at random."""
    if isinstance(data, DataLoader):
        raise UsageError(
            f"{which} is a DataLoader, whose batch size is fixed. Give its data set ({which}=loader.dataset), its "
            "collate_fn and num_workers."
        )
    if isinstance(data, IterableDataset) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise UsageError(
            f"{which} is a {type(data).__name__} without indices: examples are drawn at random. Give a data set with "
            "__len__ and __getitem__, such as a list of the examples it yields."
        )
    if isinstance(data, Mapping | type):
        raise UsageError(
            f"{which} is {called(data)}, a {type(data).__name__}, which has no examples 0, 1, .... Give a data set, "
            "such as torch.utils.data.TensorDataset(inputs, targets)."
        )
    try:
        count = len(data)
    except (TypeError, NotImplementedError) as error:
        raise UsageError(
            f"{which}, a {type(data).__name__}, has no length: {type(error).__name__}: {error}. Give a data set with "
            "__len__ and __getitem__."
        ) from None
    if not count:
        raise UsageError(f"{which} has no example. Give a data set that has some.")


def check_names(more: Iterable[str], makes: Callable[..., Any]) -> None:
    """Raise UsageError for an argument that is none of these parts."""
    known = [name for name in inspect.signature(makes).parameters if name != "self"]
    for name in more:
        if name not in known:
            raise unknown("from_parts: argument", name, known)


def check_functions(**given: Any) -> None:
    """Raise UsageError for a part that must be a function, and is none."""
    for name, part in given.items():
        if part is not None and not callable(part):
            made = f" that makes a {type(part).__name__}" if name in ("optimizer", "schedule") else ""
            raise UsageError(f"{name} is a {type(part).__name__}, which cannot be called. Give a function{made}.")


def check_mappings(**given: Any) -> None:
    """Raise UsageError for a part that must have values by name, and has none."""
    for name, part in given.items():
        if part is not None and not (isinstance(part, Mapping) and all(isinstance(key, str) for key in part)):
            raise UsageError(f"{name} is {part!r}. Give a dict of values by name, as of a class.")


def check_loading(num_workers: Any, options: Mapping[str, Any], loader: Callable[[], Any]) -> None:
    """Raise UsageError for options of which no DataLoader can be made."""
    if not isinstance(num_workers, int) or isinstance(num_workers, bool) or num_workers < 0:
        raise UsageError(f"num_workers {num_workers!r}: give the number of processes that load, 0 or more.")
    free = [name for name in inspect.signature(DataLoader).parameters if name not in _OWN]
    for name, value in options.items():
        if name in _OWN:
            raise UsageError(f"loader_options: {name}={value!r} is not free. {_OWN[name]}")
        if name not in free:
            raise unknown("loader_options: argument", name, free)
    if not options:
        return
    try:
        with warnings.catch_warnings(action="ignore"):  # of many workers: the measurement makes one that may warn
            loader()
    except Exception as error:
        raise UsageError(
            f"loader_options {dict(options)}: torch makes no DataLoader of them, {type(error).__name__}: {error}. Give "
            "what a torch DataLoader takes."
        ) from error


def kind_of(loss: Callable[..., Any]) -> tuple[Kind, bool]:
    """Whether a loss is a criterion of (output, target) or a function of (model, batch), and whether that is sure.

    By the names of its arguments, which say it of functions, modules, partial and compiled ones; else modules and what
    torch has are criteria.

    Raises:
        UsageError: it cannot be called with two arguments.
    """
    inner, torchs = _inner(loss), is_torchs(loss)
    module = isinstance(inner, torch.nn.Module)
    try:
        if loss is inner and isinstance(inner, torch.nn.Module):
            signature = inspect.signature(getattr(inner, "_orig_mod", inner).forward)  # of a compiled one
        else:
            signature = inspect.signature(loss)
    except (TypeError, ValueError):  # built in
        return "criterion" if module or torchs else "function", False
    try:
        names = list(signature.bind(None, None).arguments)
    except TypeError as error:
        raise UsageError(
            f"loss {called(loss)}{signature} cannot be called with two arguments: {error}. Give a function of (model, "
            "batch), or a criterion of (output, target)."
        ) from None
    first, second = (names + [""] * 2)[:2]
    if first in _MODELS or second in _BATCHES:
        return "function", True
    if torchs or second in _TARGETS:
        return "criterion", True
    return "criterion" if module else "function", False


def is_torchs(loss: Callable[..., Any]) -> bool:
    """Whether a loss is one of torch's own modules or functions, arguments given to it or not."""
    inner = _inner(loss)
    home = type(inner) if isinstance(inner, torch.nn.Module) else inner
    return str(getattr(home, "__module__", None)).split(".")[0] == "torch"


def _inner(loss: Callable[..., Any]) -> Any:
    inner: Any = loss
    while isinstance(inner, functools.partial):
        inner = inner.func
    return inner


def misunderstood(loss: Callable[..., Any], kind: Kind, error: Exception) -> UsageError:
    """The error of a loss that may be of the other kind than it was taken for."""
    taken, remedy = {
        "criterion": (
            "a criterion of (output, target)",
            "(model, batch), give lambda model, batch: loss(model, batch)",
        ),
        "function": (
            "a function of (model, batch)",
            "(output, target), give lambda model, batch: loss(model(batch[0]), batch[1])",
        ),
    }[kind]
    return UsageError(
        f"loss {called(loss)} was taken for {taken}, and raised {type(error).__name__}: {error}. If it is of {remedy}."
    )


def called(given: Any) -> str:
    """The name of a function, of a partial one, or of the class of an object."""
    inner = given.func if isinstance(given, functools.partial) else given
    return str(getattr(inner, "__name__", type(inner).__name__))
