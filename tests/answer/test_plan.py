"""Plans of a global batch: exact, by brute force; what cannot be is answered with the nearest that can."""

import dataclasses

import pytest

from pybatch.answer import plan as plan_module
from pybatch.answer.plan import exact, nearest, of_record, plan_accumulation, sentence
from pybatch.base.errors import UsageError
from pybatch.records import Capacity, FrontierPoint


def fits(batch, devices, largest):
    """Whether a batch divides over the devices and into at most twice the fewest equal passes, by trying all."""
    share, rest = divmod(batch, devices)
    fewest = -(-share // largest)
    return share > 0 and not rest and any(share % k == 0 for k in range(fewest, 2 * fewest + 1))


@pytest.mark.parametrize("largest", [1, 7, 40, 100])
@pytest.mark.parametrize("share", [97, 96, 12, 1, 360, 2**12 - 1])
def test_passes_are_the_least_divisor(share, largest):
    fewest = -(-share // largest)
    found = next((k for k in range(fewest, 2 * fewest + 1) if share % k == 0), None)
    assert plan_module._passes(share, largest) == found


def test_a_global_batch_of_any_size_is_answered_at_once(run):
    plan = plan_accumulation(run.capacity, 10**12)
    assert plan.micro_batch * plan.accumulation == 10**12
    assert plan.micro_batch <= run.capacity.max_batch
    assert len(nearest(2**40 - 87, 1, 2**20 - 3)) == 2  # a prime
    with pytest.raises(UsageError, match="at most"):
        plan_accumulation(run.capacity, 10**30)


@pytest.mark.parametrize(
    ("wanted", "devices", "micro", "accumulation"),
    [(64, 1, 64, 1), (81_920, 1, 81_920, 1), (163_840, 1, 81_920, 2), (163_840, 2, 81_920, 1), (90_000, 1, 45_000, 2)],
)
def test_the_plan_has_the_fewest_equal_passes_that_fit(run, wanted, devices, micro, accumulation):
    plan = plan_accumulation(run.capacity, wanted, devices)
    assert (plan.micro_batch, plan.accumulation) == (micro, accumulation)
    assert plan.devices * plan.micro_batch * plan.accumulation == wanted
    assert plan.step_s == pytest.approx(accumulation * run.capacity.model.step_s(micro))


@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize("largest", [1, 13, 100])
@pytest.mark.parametrize("wanted", [1, 7, 100, 509, 4099])
def test_the_nearest_exact_choices_are_the_nearest(wanted, devices, largest):
    below = next((b for b in range(wanted - 1, 0, -1) if fits(b, devices, largest)), None)
    above = next(b for b in range(wanted + 1, 10 * wanted + 10 * devices) if fits(b, devices, largest))
    assert nearest(wanted, devices, largest) == tuple(b for b in (below, above) if b)
    if fits(wanted, devices, largest):
        assert exact(wanted, devices, largest) == wanted
    else:
        assert exact(wanted, devices, largest) in (below, above)


def test_plans_that_cannot_be_made_say_why_and_what_can(run):
    with pytest.raises(UsageError, match=r"does not divide over 3 devices\. Use 99 or 102"):
        plan_accumulation(run.capacity, 100, 3)
    with pytest.raises(UsageError, match=r"does not divide over 8 devices\. Use 8\."):
        plan_accumulation(run.capacity, 3, 8)
    with pytest.raises(UsageError, match=r"equal micro-batches .* Use 163840 or 163842"):
        plan_accumulation(run.capacity, 163_841)
    with pytest.raises(UsageError, match="at least 1"):
        plan_accumulation(run.capacity, 0)
    for wrong, said in ((Capacity, "the class Capacity"), ("x", "'x'"), (run, "Run")):
        with pytest.raises(UsageError, match=f"capacity is {said}.*Give a run's .capacity"):
            plan_accumulation(wrong, 64)
    with pytest.raises(UsageError, match="was not measured"):
        plan_accumulation(dataclasses.replace(run.capacity, max_batch=None), 64)


def test_a_limit_given_goes_before_the_one_measured(run):
    plan = plan_accumulation(run.capacity, 4096, 8, largest=100)
    assert (plan.micro_batch, plan.accumulation) == (64, 8)
    assert plan_accumulation(None, 4096, largest=4096).step_s is None
    with pytest.raises(UsageError, match="holds no example"):
        plan_accumulation(None, 4096, largest=0)


def test_a_record_gives_the_batch_of_the_devices_worth_it(run):
    assert of_record(run) == (32, 1)
    points = tuple(FrontierPoint(k, b, 1.0, 1.0) for k, b in ((1, 32), (2, 48), (4, 70), (8, 90)))
    wide = dataclasses.replace(run, verdict=dataclasses.replace(run.verdict, useful_devices=6, frontier=points))
    assert of_record(wide) == (70, 4)
    assert of_record(wide, 8) == (90, 8)
    assert of_record(wide, 1) == (32, 1)
    assert "70 = 35 examples × 2 passes × 1 device" in sentence(plan_accumulation(None, 70, largest=40))
    with pytest.raises(UsageError, match="advises no batch"):
        of_record(dataclasses.replace(run, verdict=None))
