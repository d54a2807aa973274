"""`BatchSchedule` in a loop: exact in examples, settings within the step alone, resumed where it stood."""

import math

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from pybatch import records as r
from pybatch.base.errors import UsageError
from pybatch.optim import AdamW
from pybatch.schedule import BatchSchedule, ScheduledBatches, passes_of

STAGES = [(0, 8), (40, 16), (104, 64)]


def model_and(optimizer=torch.optim.AdamW, **options):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    return model, optimizer(model.parameters(), **options)


def passes(schedule, steps):
    """(batch, accumulation, examples before) of each step."""
    found = []
    for _ in range(steps):
        found.append((schedule.batch, schedule.accumulation, schedule.examples))
        schedule.step()
    return found


def test_batches_switch_at_their_example():
    found = passes(BatchSchedule(STAGES, micro_batch=4, devices=2), 12)
    assert [batch for batch, _, _ in found] == [8] * 5 + [16] * 4 + [64] * 3
    assert [k for _, k, _ in found] == [1] * 5 + [2] * 4 + [8] * 3
    assert [seen for _, _, seen in found] == [0, 8, 16, 24, 32, 40, 56, 72, 88, 104, 168, 232]


@pytest.mark.parametrize(
    ("rule", "factor"), [("sqrt", math.sqrt), ("linear", lambda ratio: ratio), ("constant", lambda ratio: 1.0)]
)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, AdamW, torch.optim.SGD])
def test_a_step_is_that_of_an_optimizer_with_the_scaled_settings(kind, rule, factor):
    """Against a twin whose groups are set by hand; the script's own settings are untouched between steps."""
    more = {"momentum": 0.9} if kind is torch.optim.SGD else {"betas": (0.9, 0.99)}
    more |= {"weight_decay": 0.1, "lr": 0.01}
    (model, optimizer), (twin, other) = model_and(kind, **more), model_and(kind, **more)
    adaptive = kind is not torch.optim.SGD
    schedule = BatchSchedule(
        STAGES, optimizer, base_batch=16, rate=rule, beta2="half-life" if adaptive else None, decay="timescale"
    )
    for _ in range(12):
        ratio = schedule.batch / 16
        assert schedule.rate_factor == pytest.approx(factor(ratio))
        [group] = other.param_groups
        group["lr"], group["weight_decay"] = 0.01 * factor(ratio), 0.1 * (ratio / factor(ratio))
        if adaptive:
            group["betas"] = (0.9, 0.99**ratio)
        x = torch.randn(schedule.batch, 4)
        for net, steps in ((model, optimizer), (twin, other)):
            net(x).square().mean().backward()
            steps.step()
            steps.zero_grad()
        own = optimizer.param_groups[0]
        assert (own["lr"], own["weight_decay"]) == (0.01, 0.1)
        schedule.step()
        assert torch.allclose(model.weight, twin.weight, rtol=1e-6, atol=1e-7)


def test_a_rate_schedule_of_the_script_goes_on_as_if_the_batch_never_changed():
    _, optimizer = model_and(torch.optim.SGD, lr=1.0)
    _, twin = model_and(torch.optim.SGD, lr=1.0)
    schedule = BatchSchedule(STAGES, optimizer, rate="linear")
    pairs = [
        torch.optim.lr_scheduler.SequentialLR(
            one,
            [
                torch.optim.lr_scheduler.LinearLR(one, 0.1, total_iters=4),
                torch.optim.lr_scheduler.CosineAnnealingLR(one, 20),
            ],
            [4],
        )
        for one in (optimizer, twin)
    ]
    for _ in range(12):
        for one, rates in zip((optimizer, twin), pairs, strict=True):
            one.step()
            rates.step()
        schedule.step()
        assert optimizer.param_groups[0]["lr"] == twin.param_groups[0]["lr"]


def test_a_rate_that_is_a_tensor_keeps_its_place_and_value():
    rate = torch.tensor(0.01)
    model, optimizer = model_and(lr=rate)
    schedule = BatchSchedule(STAGES, optimizer, base_batch=64)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(float(rate)))
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.01)
    assert seen == [pytest.approx(0.01 * schedule.rate_factor)]


def test_a_step_that_raises_leaves_settings_that_the_next_one_puts_back():
    model, optimizer = model_and(torch.optim.SGD, lr=1.0)
    BatchSchedule(STAGES, optimizer, base_batch=16, rate="linear")

    def fail():
        raise KeyError

    with pytest.raises(KeyError):
        optimizer.step(fail)
    model(torch.ones(2, 4)).sum().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    assert torch.allclose(before - model.weight, 0.5 * model.weight.grad)
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_resumed_where_it_stood():
    whole = BatchSchedule(STAGES)
    told = passes(whole, 12)
    first = BatchSchedule(STAGES)
    begun = passes(first, 7)
    second = BatchSchedule(STAGES)
    second.load_state_dict(first.state_dict())
    assert [*begun, *passes(second, 5)] == told
    with pytest.raises(UsageError, match="lacks its parts"):
        second.load_state_dict({"batch": 8})
    for damage in ({"batch": 0}, {"examples": -1}, {"batch": 12}):
        with pytest.raises(UsageError):
            second.load_state_dict(first.state_dict() | damage)


class Growing:
    """A noise scale that the test sets."""

    def __init__(self):
        self.value, self.low, self.status = 10.0, 5.0, "resolved"

    @property
    def noise(self):
        return r.NoiseScale(self.value, self.low, None, 1.0, 1.0, self.status, "planted", 10)


def test_by_noise_it_doubles_when_asked_and_never_twice_in_a_row_or_down():
    noise = Growing()
    schedule = BatchSchedule(8, noise=noise, cost=0.5, every=5, most=32)
    batches = []
    for step in range(40):
        if step == 7:
            noise.value = 1000.0  # asks for 500 at once
        if step == 30:
            noise.value = 1.0
        batches.append(schedule.batch)
        schedule.step()
    assert batches == [8] * 10 + [16] * 5 + [32] * 25


def test_by_noise_a_reading_that_scatters_about_the_switch_does_not_switch():
    noise = Growing()
    schedule = BatchSchedule(8, noise=noise, cost=0.5, every=1, most=64)
    for step in range(20):
        noise.value = 32.0 * (1.05 if step % 2 else 0.95)  # 16 is asked for at 32
        schedule.step()
    assert schedule.batch == 8
    noise.status, noise.value, noise.low = "lower_bound", None, 40.0
    schedule.step()
    assert schedule.batch == 16


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_schedules_batches(workers):
    data = TensorDataset(torch.arange(400))
    torch.manual_seed(0)
    sampler = ScheduledBatches(RandomSampler(data), BatchSchedule(STAGES))
    loader = DataLoader(data, batch_sampler=sampler, num_workers=workers)
    batches = [batch for [batch] in loader]
    assert [len(batch) for batch in batches] == [8] * 5 + [16] * 4 + [64] * 4
    assert len(torch.cat(batches).unique()) == 5 * 8 + 4 * 16 + 4 * 64
    later = BatchSchedule(STAGES)
    passes(later, 9)
    again = DataLoader(data, batch_sampler=ScheduledBatches(RandomSampler(data), later))
    assert [len(batch) for [batch] in again] == [64] * 6
    assert len(again) == 6


def test_a_loader_that_is_left_early_goes_on_where_the_training_stands():
    """Batches that workers had fetched are not counted as trained on."""
    data, schedule = TensorDataset(torch.arange(400)), BatchSchedule([(0, 8), (160, 16)])
    loader = DataLoader(data, batch_sampler=ScheduledBatches(RandomSampler(data), schedule), num_workers=2)
    sizes = []
    for _ in range(3):
        for place, [batch] in enumerate(loader):
            if place == 8:
                break
            sizes.append(len(batch))
            schedule.step()
    assert sizes == [8] * 20 + [16] * 4
    assert schedule.examples == sum(sizes)


@pytest.mark.parametrize("epoch", [8, 9, 13, 32])
@pytest.mark.parametrize("steps", [1, 5, 9, 14, 60])
def test_passes_to_come_are_those_of_a_loop_in_epochs(epoch, steps):
    schedule, made, done, longest = BatchSchedule(STAGES, micro_batch=8), 0, 0, 0
    said = passes_of(schedule, steps, epoch)
    for _ in range(steps):
        taken = min(schedule.accumulation, epoch - made)
        longest = max(longest, schedule.accumulation)
        made, done = made + taken, done + taken
        schedule.step(taken, lambda passes: made % passes == 0)  # noqa: B023
        if made == epoch:
            made = 0
            schedule.switch()
    assert said[1] == done
    assert said[0] >= longest


@pytest.mark.parametrize(
    ("stages", "more", "says"),
    [
        ([], {}, "give pairs"),
        ([(10, 8)], {}, "from \\(0, B\\) on"),
        ([(0, 8), (0, 16)], {}, "rising in examples"),
        ([(0, 0)], {}, "at least one example"),
        ([(0, 8.0)], {}, "give pairs"),
        (STAGES, {"micro_batch": 3}, "batch 8 is no multiple of micro_batch 3 x 1 devices"),
        (STAGES, {"micro_batch": 8, "devices": 3}, "no multiple"),
        (STAGES, {"rate": "cubic"}, "rate 'cubic' is not known"),
        (STAGES, {"beta2": "halflife"}, "give 'half-life'"),
        (STAGES, {"noise": Growing(), "most": 64}, "give the first batch alone"),
        (8, {"noise": Growing()}, "needs most="),
        (8, {}, "nothing to follow"),
        (8, {"noise": object(), "most": 64}, "a object measures none"),
        (r.Run("", None), {}, "this record has no schedule"),
        (STAGES, {"optimizer": model_and(torch.optim.SGD, lr=0.1)[1], "beta2": "half-life"}, "SGD has no betas"),
        (8, {"noise": Growing(), "most": 64, "every": 0}, "every 0"),
        (STAGES, {"base_batch": -4}, "base_batch -4"),
        (STAGES, {"rate": "adam-sde"}, "rate 'adam-sde' is not known"),
        (STAGES, {"rate": "tuned"}, "rate 'tuned' is not known"),
    ],
)
def test_bad_arguments(stages, more, says):
    with pytest.raises(UsageError, match=says):
        BatchSchedule(stages, **more)


def test_a_sampler_is_not_driven_by_noise():
    schedule = BatchSchedule(8, noise=Growing(), most=64)
    with pytest.raises(UsageError, match="asked ahead"):
        ScheduledBatches(range(8), schedule)
