"""What is not what an entry point asks for is answered as the command line answers: the value, and what to give."""

import math
import re
import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
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


WRONG: dict[str, tuple[Any, str]] = {
    "one batch size": (
        lambda: ENTRIES["capacity"](Digits(), batches=8),
        "measure_capacity(): batches is 8. Give a list of whole numbers, such as [8, 16], or None.",
    ),
    "text for batch sizes": (
        lambda: pybatch.measure_convergence(Digits(), "8,16", device="cpu"),
        "measure_convergence(): batches is '8,16'. Give a list of whole numbers, such as [8, 16].",
    ),
    "letters among batch sizes": (
        lambda: ENTRIES["capacity"](Digits(), batches=["a"]),
        "measure_capacity(): batches is ['a']. Give a list",
    ),
    "a generator": (
        lambda: ENTRIES["capacity"](Digits(), batches=iter([1, 2])),
        "measure_capacity(): batches is <list_iterator",
    ),
    "half a batch size": (
        lambda: ENTRIES["capacity"](Digits(), batches=[8.5]),
        "measure_capacity(): batches is [8.5]. Give a list of whole numbers",
    ),
    "a rule by itself": (
        lambda: ENTRIES["sweep"](Digits(), rules="tuned"),
        "measure_convergence(): rules is 'tuned'. Give a list of names.",
    ),
    "no rules": (
        lambda: ENTRIES["sweep"](Digits(), rules=None),
        "measure_convergence(): rules is None. Give a list of names.",
    ),
    "a class among rules": (
        lambda: ENTRIES["sweep"](Digits(), rules=[dict]),
        "rule <class 'dict'> is no name. Known: adam-sde",
    ),
    "rates": (lambda: ENTRIES["sweep"](Digits(), rates=0.1), "rates is 0.1. Give a list of numbers, or None."),
    "seeds": (lambda: ENTRIES["sweep"](Digits(), seeds="3"), "seeds is '3'. Give a whole number."),
    **{
        f"a negative seed of {entry}": (
            lambda call=call: call(Digits(), seed=-1),
            "seed -1 is out of range. Give a whole number from 0 to 2**63 - 1.",
        )
        for entry, call in ENTRIES.items()
    },
    "a negative seed of a fit": (lambda: pybatch.fit_steps([1, 2], [9, 8], seed=-1), "seed -1 is out of range."),
    "a huge seed of a fit": (lambda: pybatch.fit_throughput([1, 2], [9, 8], seed=2**63), f"seed {2**63} is out of"),
    "a time budget as text": (
        lambda: ENTRIES["capacity"](Digits(), time_budget="90"),
        "measure_capacity(): time_budget is '90'. Give a number.",
    ),
    "of noise": (lambda: ENTRIES["noise"](Digits(), time_budget=[1]), "measure_noise(): time_budget is [1]. Give a"),
    "of branches": (lambda: ENTRIES["branches"](Digits(), factors=4), "factors is 4. Give a list of numbers."),
    "a precision of torch": (lambda: ENTRIES["capacity"](Digits(), dtype=torch.float32), "Use one of: fp32, bf16"),
    "a caps's text": (lambda: pybatch.fit_steps([1, 2, 3], [3, 2, 1], cap="x"), "cap is not a table of numbers"),
    "resamples": (
        lambda: pybatch.fit_steps([1, 2, 3], [3, 2, 1], resamples="x"),
        "fit_steps(): resamples is 'x'. Give a whole number.",
    ),
    "a model's number": (
        lambda: pybatch.fit_steps([1, 2, 3], [3, 2, 1], model=3),
        "model 3 is no name. Known: ",
    ),
    "no file": (
        lambda: pybatch.fit_steps_csv(None),
        "fit_steps_csv(): path is None. Give a path.",
    ),
    "one step time": (
        lambda: pybatch.fit_throughput(8, 0.1),
        "a throughput fit needs 3 distinct batch sizes, found 8.",
    ),
    "no step times": (
        lambda: pybatch.fit_throughput([1, 2, 3], None),
        "seconds is None. Give a list, with one entry per batch.",
    ),
    "step times as text": (
        lambda: pybatch.fit_throughput([1, 2, 3], [1, "x", 3]),
        "seconds holds 'x'. Give numbers.",
    ),
    "batch sizes as letters": (
        lambda: pybatch.fit_throughput(["a", "b", "c"], [1, 2, 3]),
        "batches holds ['a', 'b', 'c']. Give numbers.",
    ),
    "a gain": (
        lambda: pybatch.fit_throughput([1, 2, 3], [1, 2, 3], gain="x"),
        "fit_throughput(): gain is 'x'. Give a number.",
    ),
    "a model for a file": (
        lambda: pybatch.watch(torch.nn.Linear(2, 2)),
        "watch(): output is Linear(in_features=2, out_features=2, bias=True). Give a path, or None.",
    ),
    "no page": (lambda: pybatch.write_report([], None), "write_report(): path is None. Give a path."),
    "no record": (lambda: pybatch.Run.from_json(None), "Run.from_json(): text is None. Give what a record's"),
    "a model for its parameters": (
        lambda: pybatch.optim.AdamW(torch.nn.Linear(2, 2)),
        "AdamW(): params is Linear(in_features=2, out_features=2, bias=True). Give its parameters: "
        "AdamW(model.parameters()).",
    ),
    "a rate as text": (
        lambda: pybatch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr="x"),
        "lr is 'x'. Give a number",
    ),
    "a target's text": (
        lambda: ENTRIES["sweep"](Digits(), target={"train": "a"}),
        "target is {'train': 'a'}. Give a mapping of names to numbers, or None.",
    ),
    "targets in a list": (lambda: ENTRIES["sweep"](Digits(), target=[1]), "target is [1]. Give a mapping"),
    "an array without dimensions": (
        lambda: ENTRIES["capacity"](Digits(), batches=np.array(8)),
        "measure_capacity(): batches is array(8). Give a list of whole numbers",
    ),
    "yes for a time budget": (
        lambda: ENTRIES["capacity"](Digits(), time_budget=True),
        "measure_capacity(): time_budget is True. Give a number.",
    ),
    "too large for a number": (
        lambda: pybatch.fit_throughput([1, 2, 3], [1, 2, 3], gain=10**400),
        "fit_throughput(): gain is ",
    ),
    "lists of rounds": (
        lambda: pybatch.fit_throughput([1, 2, 3], [1, 2, 3], rounds=[["a"]]),
        "Give a list of lists of whole numbers, such as [8, 16], or None.",
    ),
    "a model's class": (lambda: pybatch.optim.Muon(torch.nn.Linear), "Muon(): params is the class Linear. Give its"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_number_list_or_path(what: str) -> None:
    call, says = WRONG[what]
    with pytest.raises(UsageError, match=re.escape(says)):
        call()


def test_an_option_that_a_sweep_does_not_have_is_named() -> None:
    with pytest.raises(
        TypeError, match=re.escape("measure_convergence() got an unexpected keyword argument 'targets'")
    ):
        pybatch.measure_convergence(Digits(), [8, 16], targets={"train": 0.1})  # type: ignore[call-arg]


def test_what_is_sensible_is_not_refused() -> None:
    """Whole floats, arrays, names of seeds as letters."""
    from pybatch.sweep.options import SweepOptions

    assert SweepOptions(batches=[8], rates=np.geomspace(0.1, 1, 3), max_steps=1e3).rates[0] == 0.1
    pybatch.fit_throughput([1, 2, 4], [1.0, 1.5, 2.5], resamples=100.0)
    pybatch.fit_steps([8, 8, 16, 16, 32, 32], [90, 91, 50, 52, 30, 31], seeds="ababab", resamples=20)
    pybatch.noise.attach(
        model := torch.nn.Linear(2, 2),
        torch.optim.SGD(model.parameters()),
        "micro-batches",
        every=np.int64(2),
        layers=1,
    ).detach()


def test_numbers_of_every_kind_are_taken() -> None:
    """NumPy's, torch's and Python's; sizes as an array, a tuple or a range."""
    sizes: list[Any] = [np.array([1, 2, 4]), (1, 2, np.int64(4)), range(1, 4), torch.tensor([1, 2, 4])]
    budgets = [np.float32(1), torch.tensor(1.0), 1, Fraction(1)]
    for batches, budget in zip(sizes, budgets, strict=True):
        found = ENTRIES["capacity"](Digits(), batches=batches, time_budget=budget, find_max_batch=False)
        assert [point.batch for point in found.batches][:2] == [1, 2]
        assert not [point for point in found.batches if "dimension 0" in (point.reason or "")]


def test_a_plan_of_tensors_is_of_numbers() -> None:
    plan = pybatch.plan_accumulation(None, torch.tensor(32), torch.tensor(2), largest=torch.tensor(8))
    assert plan == pybatch.plan_accumulation(None, 32, 2, largest=8)
    assert {type(value) for value in vars(plan).values()} == {int, type(None)}


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
