"""The input pipeline: rates of a real loader; what follows from planted ones for bounds, workers and the verdict."""

import dataclasses
import time

import pytest
import torch
from cases.patience import with_time
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pybatch import Workload, advise
from pybatch.answer.input import kept_batch, waiting, with_input_bounds, with_loader, workers_needed
from pybatch.base.errors import WorkloadError
from pybatch.capacity.input import measure_input
from pybatch.capacity.step import TrainingStep
from pybatch.records import BatchPoint, InputPipeline, InputRate, Note
from pybatch.workloads.running.session import Session

CPU = torch.device("cpu")
NAP = 0.002  # s to load an example: a worker cannot give more than 500 a second


class Slow(Dataset):
    def __init__(self, broken=False):
        self.broken = broken

    def __len__(self):
        return 64

    def __getitem__(self, i):
        if self.broken:
            raise OSError(f"image {i} is cut")
        time.sleep(NAP)
        return torch.full((4,), float(i)), i % 2


def make():
    return nn.Linear(4, 2)


def slow(workers, **more):
    return Workload.from_parts(
        model=make, train=Slow(**more), loss=nn.CrossEntropyLoss(), num_workers=workers, reference_batch=4
    )


def timed(batch, rate):
    return BatchPoint(batch, "ok", step_ms=1e3 * batch / rate, samples_per_s=rate)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loaders_rate_is_what_its_examples_take(workers):
    session = Session(slow(workers), CPU)
    points = [timed(4, 1e5), timed(16, 3e5), timed(256, 1e6)]

    def waited(found):
        """While this process is off its core workers get ahead, and a few steps after it wait for nothing."""
        return all(rate.with_step_ms >= 0.95 * 1e3 * rate.batch * NAP / max(1, workers) for rate in found.rates)

    found = with_time(lambda budget: measure_input(session, TrainingStep(session), points, budget), waited, 0.6)
    assert isinstance(found, InputPipeline)
    assert found.workers == workers
    assert [rate.batch for rate in found.rates][:2] in ([4], [4, 16])
    assert waited(found)
    for rate in found.rates:
        assert 0 < rate.samples_per_s <= 1.05 * max(1, workers) / NAP
    assert found.one_worker_per_s <= 1.05 / NAP
    assert found.kept_batch is None


def test_a_loader_that_fails_or_ends_is_a_note():
    session = Session(slow(0, broken=True), CPU)
    found = measure_input(session, TrainingStep(session), [timed(4, 1e5)], 0.1)
    assert isinstance(found, Note)
    assert "OSError: image" in found.text

    class Short(Workload):
        def model(self):
            return make()

        def batch(self, n, generator, split="train"):
            return torch.zeros(n, 4), torch.zeros(n, dtype=torch.long)

        def loss(self, model, batch):
            return nn.functional.cross_entropy(model(batch[0]), batch[1])

        def loader(self, n, workers=None):
            return DataLoader([(torch.zeros(4), 0)] * 8, batch_size=n) if n < 8 else None

    session = Session(Short(), CPU)
    found = measure_input(session, TrainingStep(session), [timed(4, 1e5)], 0.1)
    assert "ended after" in found.text
    with pytest.raises(WorkloadError, match="returned NoneType"):
        session.loader(8)
    assert isinstance(measure_input(session, TrainingStep(session), [], 0.1), Note)


PIPELINE = InputPipeline(2, 500.0, (InputRate(8, 1000.0),))


@pytest.mark.parametrize(
    ("workers", "rate", "share"),
    [(2, 500.0, 0.0), (2, 1000.0, 0.0), (2, 4000.0, 0.75), (0, 1000.0, 0.5), (0, 3000.0, 0.75)],
)
def test_workers_load_beside_the_step_and_the_training_itself_before_it(workers, rate, share):
    pipeline = dataclasses.replace(PIPELINE, workers=workers)
    assert waiting(pipeline, timed(32, rate)) == pytest.approx(share)


def test_a_step_that_was_run_with_the_loader_goes_before_the_rates():
    pipeline = InputPipeline(2, 500.0, (InputRate(8, 1000.0, with_step_ms=16.0),))
    assert waiting(pipeline, timed(8, 2000.0)) == pytest.approx(1 - 4 / 16)


def test_workers_and_batches_at_which_it_would_keep_up():
    points = [timed(2, 300.0), timed(8, 900.0), timed(32, 3000.0), timed(128, 5100.0)]
    assert [workers_needed(PIPELINE, p) for p in points] == [1, 2, 6, 11]
    assert kept_batch(PIPELINE, points) == 8
    pipeline = dataclasses.replace(PIPELINE, kept_batch=8)
    found = with_input_bounds(points, pipeline)
    assert [p.bound_by for p in found] == [None, None, "input", "input"]
    assert "6 workers would do, and up to batch 8 it keeps up as it is" in found[2].bound_why
    assert with_input_bounds(found, pipeline) == found  # said once
    assert with_input_bounds(points, None) == points


def test_the_verdict_says_it_before_the_batch_size(run):
    assert with_loader(advise(run.capacity, run.noise), run.capacity).limit != "input"
    rate = max(p.samples_per_s for p in run.capacity.batches if p.samples_per_s)
    slow = dataclasses.replace(
        run.capacity, input=InputPipeline(2, rate / 100, (InputRate(8, rate / 50),), kept_batch=1)
    )
    verdict = advise(slow, run.noise)
    assert verdict.limit == "input"
    assert "workers would do (it has 2), and there are 2 cores" in verdict.because
    assert "Up to batch 1 it keeps up as it is. A larger batch helps nothing before that." in verdict.because
    assert verdict.text.startswith(verdict.answer)
    assert verdict.why("limit").evidence == "measured"
    fast = dataclasses.replace(run.capacity, input=InputPipeline(2, rate, (InputRate(8, 2 * rate),)))
    assert advise(fast, run.noise) == advise(run.capacity, run.noise)


def test_the_record_keeps_it(run):
    from pybatch import Run
    from pybatch.report.formats.text import render

    kept = dataclasses.replace(run, capacity=dataclasses.replace(run.capacity, input=PIPELINE))
    again = Run.from_json(kept.to_json())
    assert again.capacity.input == PIPELINE
    assert "1,000 images/s at batch 8; 2 workers, 500/s each" in " ".join(render(again, "md").split())
