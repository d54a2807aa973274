"""The tables in this folder, found by themselves: a module with VARIANTS is an optimizer's.

Its RULES are those of kernels/rules.h that are its own: name -> (hyper-parameters, options of the reference) and, where
it is not the module's `reference`, the reference.
"""

from importlib import import_module
from pathlib import Path

import pytest

OPTIMIZERS = [
    import_module(f"cases.{path.stem}")
    for path in sorted(Path(__file__).parent.glob("*.py"))
    if "\nVARIANTS = " in path.read_text()  # the others may import this module
]
EXACT = [case for case in OPTIMIZERS if not hasattr(case, "NOISE")]  # those whose whole step is in fp32


def label(value):
    """Id of a test's parameter: the name of a module or function, or options as they are written."""
    return getattr(value, "__name__", str(value)).removeprefix("cases.")


def variants(cases):
    """Parametrize over (case, options)."""
    rows = [(case, options) for case in cases for options in case.VARIANTS]
    return pytest.mark.parametrize(("case", "options"), rows, ids=label)


def wrong_rules(cases):
    """Parametrize over (case, wrong, options): updates that the check of a right one must refuse."""
    rows = [(case, wrong, options) for case in cases for wrong, options in case.WRONG]
    return pytest.mark.parametrize(("case", "wrong", "options"), rows, ids=label)


def optimizers(cases):
    """Parametrize over case."""
    return pytest.mark.parametrize("case", cases, ids=label)


def whole(case):
    """Options with which the optimizer's own rule takes every tensor of the problem, none is skipped."""
    return next((options for options in case.VARIANTS if options.get("skip") is False), {})
