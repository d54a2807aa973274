"""Find a workload by what a user types: a shipped name, or `path/file.py:Class`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pybatch.workloads
from pybatch.base.errors import UsageError, WorkloadError, unknown
from pybatch.workloads.base import Workload, registered
from pybatch.workloads.running.calls import told
from pybatch.workloads.running.sharing import put_back

FILE_MODULE = "_pybatch_workload_"  # prefix of the modules made from users' files
_digests: dict[str, str] = {}  # of users' files as they were loaded, by module


def shipped() -> dict[str, type[Workload]]:
    """The workloads that ship, by name: every module of this package is looked through for `@register`."""
    for module in pkgutil.iter_modules(pybatch.workloads.__path__):
        importlib.import_module(f"pybatch.workloads.{module.name}")
    return registered()


def find(
    spec: str,
    *,
    model: str | None = None,
    data: str | None = None,
    options: Sequence[str] = (),
    size: str | None = None,
) -> Workload:
    """The workload a user named, constructed.

    Args:
        spec: a shipped name ("digits"), or "path/file.py:NAME" for the user's own: a subclass of `pybatch.Workload`, a
            workload that was made, as by `Workload.from_parts`, or a function that makes one.
        model: one of the class's `models`; None for its default.
        data: path of a data file or folder, for a class that takes one.
        options: "key=value" for further arguments of the constructor, such as the dials of `pybatch list`.
        size: one of the class's `sizes`; its arguments give way to `model`, `data` and `options`.

    Raises:
        UsageError: no such name, file, class, model, data, option or size.
        WorkloadError: the class's constructor raised.
    """
    path, _, name = spec.rpartition(":")
    if is_users(spec):
        found = _from_file(spec, path, name)
        if isinstance(found, Workload):
            asked = {"--model": model, "--data": data, "--option": options, "--size": size}
            if needless := [flag for flag, value in asked.items() if value]:
                raise UsageError(f"{needless[0]}: workload '{spec}' is made in its file, and takes none. Leave it out.")
            return found
        cls = found
    else:
        known = shipped()
        if spec not in known:
            raise unknown("workload", spec, known)
        cls = known[spec]
    given = {key: value for key, value in (("model", model), ("data", data)) if value is not None}
    return _construct(cls, spec, given, options, _of_size(cls, spec, size))


def load_file(path: Path, name: str | None = None) -> ModuleType:
    """Run a Python file as a module, once per file; its folder joins `sys.path`, as it does under `python file.py`."""
    path = path.resolve()
    name = name or f"{FILE_MODULE}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    description = importlib.util.spec_from_file_location(name, path)
    if description is None or description.loader is None:
        raise UsageError(f"workload file '{path}' is not a Python file. Name one that ends in .py.")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    module = importlib.util.module_from_spec(description)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look their module up
    _digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()  # now: a run may outlast the file's next edit
    try:
        with put_back(str(path)):
            description.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # `sys.exit()` too is no answer
        sys.modules.pop(name, None)
        raise UsageError(f"workload file '{path}' cannot be loaded: {_said(error)}.") from error
    return module


def file_digest(workload: Workload) -> str | None:
    """SHA-256 of the user's file that a workload was loaded from by name; None for every other.

    What the file imports is not part of it.
    """
    return _digests.get(workload.defined_in or type(workload).__module__)


def _from_file(spec: str, path: str, name: str) -> type[Workload] | Workload:
    if not path or not name:
        raise UsageError(f"workload '{spec}' names no class. Write path/file.py:Class.")
    if not Path(path).is_file():
        raise UsageError(f"workload '{spec}': there is no file '{path}'.")
    module = load_file(Path(path))
    classes = {
        key: value
        for key, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, Workload) and value is not Workload
    }
    if name in classes:
        return classes[name]
    made = getattr(module, name, None)
    if inspect.isfunction(made):
        try:
            with put_back(str(Path(path).resolve())):
                made = made()
        except (UsageError, WorkloadError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise WorkloadError(f"{name}() of workload '{spec}' raised {_said(error)}.") from error
    if isinstance(made, Workload):
        made.defined_in = module.__name__
        return made
    if hasattr(module, name):
        raise UsageError(
            f"workload '{spec}': {name} is not a subclass of pybatch.Workload, nor a workload, and makes none."
        )
    raise unknown(f"'{path}' has no such workload:", name, classes)


def _of_size(cls: type[Workload], spec: str, size: str | None) -> Mapping[str, Any]:
    if size is None:
        return {}
    if not cls.sizes:
        why = "pybatch cannot know a larger model of it" if is_users(spec) else "it has one size only"
        raise UsageError(f"size {size!r}: workload '{spec}' has no sizes; {why}. Leave --size out.")
    if size not in cls.sizes:
        raise unknown(f"workload '{spec}': size", size, cls.sizes)
    return cls.sizes[size]


def is_users(spec: str) -> bool:
    """Whether a workload's name stands for a class in a file of the user's own."""
    return ":" in spec or spec.endswith(".py")


def _construct(
    cls: type[Workload], spec: str, given: dict[str, Any], options: Sequence[str], usual: Mapping[str, Any]
) -> Workload:
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise UsageError(f"workload '{spec}' lacks {missing}. Define what `pybatch.Workload` asks for.")
    takes = _parameters(cls)
    for key, value in given.items():
        if key not in takes:
            raise UsageError(f"{key} {value!r}: workload '{spec}' takes no {key}. Leave it out.")
    if "model" in given and cls.models and given["model"] not in cls.models:
        raise unknown(f"workload '{spec}': model", given["model"], cls.models)
    if "data" in takes and takes["data"].default is inspect.Parameter.empty and "data" not in given:
        raise UsageError(f"workload '{spec}' reads data of yours. Give its path with --data.")
    for option in options:
        key, value = _option(option, spec, takes)
        if key in given:
            raise UsageError(f"option '{option}': {key} is given twice. Give it once.")
        given[key] = value
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for key, one in takes.items():
        if one.kind in kinds and one.default is inspect.Parameter.empty and key not in {**usual, **given}:
            way = f"--{key} VALUE" if key in ("model", "data") else f"--option {key}=VALUE"
            raise UsageError(
                f"workload '{spec}' needs a value for {key}. Give it with {way}, or a default in its file."
            )
    try:
        with put_back(str(Path(spec.rpartition(":")[0]).resolve())):
            return cls(**{**usual, **given})
    except (UsageError, WorkloadError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise WorkloadError(f"{cls.__name__}() of workload '{spec}' raised {_said(error)}.") from error


def _said(error: BaseException) -> str:
    """What a user's file raised, with what may be behind it."""
    if isinstance(error, SystemExit):
        remedy = "It is run without arguments. Put what is for the command line under: if __name__ == '__main__'"
        return f"SystemExit: {error}. {remedy}"
    return told(error)


def _parameters(cls: type[Workload]) -> Mapping[str, inspect.Parameter]:
    """The constructor's arguments by name, their annotations as types where these can be found."""
    try:
        return inspect.signature(cls, eval_str=True).parameters
    except (NameError, TypeError, AttributeError):  # annotations that exist for type checkers only
        return inspect.signature(cls).parameters
    except ValueError:  # a constructor written in C
        return {}


def _option(option: str, spec: str, takes: Mapping[str, inspect.Parameter]) -> tuple[str, Any]:
    """The name and the value of "key=value", converted as the constructor's annotation says."""
    key, equals, text = option.partition("=")
    if not equals or not key or not text:
        raise UsageError(f"option '{option}' is no setting. Write key=value.")
    dials = sorted(name for name in takes if name not in ("model", "data"))
    if key in ("model", "data"):
        raise UsageError(f"option '{option}': the {key} has a flag of its own. Write --{key} {text}.")
    if key not in dials:
        raise unknown(f"workload '{spec}': option", key, dials)
    kind = next((k for k in (int, float, str) if takes[key].annotation in (k, k | None)), None)
    if kind is None:
        raise UsageError(f"option '{option}': {key} of workload '{spec}' takes no text. Annotate it int, float or str.")
    try:
        if kind is float and not abs(float(text)) < math.inf:
            raise ValueError
        return key, kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise UsageError(f"option '{option}' of workload '{spec}': {key} is {wanted}. Write {key}=NUMBER.") from None
