"""What is not what an entry point asks for is answered as the command line answers: the value, and what to give."""

import math
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

import pybatch
import pybatch.optim
from pybatch.base.errors import UsageError
from pybatch.workloads.digits import Digits

ENTRIES = {
    "capacity": lambda work, **more: pybatch.measure_capacity(work, device="cpu", **more),
    "noise": lambda work, **more: pybatch.measure_noise(work, device="cpu", **more),
    "branches": lambda work, **more: pybatch.measure_branches(work, device="cpu", **more),
    "sweep": lambda work, **more: pybatch.measure_convergence(work, [8, 16, 32], device="cpu", **more),
}
WORKLOADS = {
    "a class": (Digits, "workload Digits is a class. Give an instance: Digits()."),
    "a name": ("digits", "workload 'digits' is a name"),
    "a torch module": (torch.nn.Linear(2, 2), "workload is a torch module, not a Workload: subclass pybatch.Workload"),
    "a module": (math, "workload is a module, not a Workload"),
    "nothing": (None, "workload is a NoneType, not a Workload"),
}


@pytest.mark.parametrize("what", WORKLOADS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_no_workload(entry: str, what: str) -> None:
    given, says = WORKLOADS[what]
    with pytest.raises(UsageError, match=re.escape(says)):
        ENTRIES[entry](given)


@pytest.mark.parametrize("given", [torch.optim.AdamW, pybatch.optim.AdamW, 3])
@pytest.mark.parametrize("entry", ["branches", "sweep"])
def test_an_optimizer_is_a_name(entry: str, given: Any) -> None:
    name = getattr(given, "__name__", "int")
    with pytest.raises(UsageError, match=f"optimizer {name} is no name"):
        ENTRIES[entry](Digits(), optimizer=given)


def test_lists_are_no_text() -> None:
    with pytest.raises(UsageError, match=re.escape("batches '8,16' is text. Give whole numbers, such as [8, 16].")):
        ENTRIES["capacity"](Digits(), batches="8,16")
    with pytest.raises(UsageError, match=re.escape("batches '8,16' is text. Give a list: [8, 16].")):
        pybatch.measure_convergence(Digits(), "8,16", device="cpu")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=re.escape("rules 'tuned' is text. Give a list: ['tuned'].")):
        ENTRIES["sweep"](Digits(), rules="tuned")


@pytest.mark.parametrize(("given", "says"), [("a.json", "old is str 'a.json'"), (pybatch.Run, "old is the class Run")])
def test_two_runs_are_compared(given: Any, says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"compare(): {says}. Give a Run")):
        pybatch.compare(given, given)


def test_what_a_user_writes_out_is_there_after_one_import():
    names = ["noise.attach", "optim.AdamW", "schedule.BatchSchedule", "integrations.writers.CSVWriter", "advise"]
    code = "import pybatch; " + "; ".join(f"print(pybatch.{name}.__name__)" for name in names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == [name.rpartition(".")[2] for name in names], done.stderr
    with pytest.raises(AttributeError, match="nothing"):
        pybatch.nothing  # noqa: B018
