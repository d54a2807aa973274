"""Lightning: the noise scale in its loggers, a batch size that was always run, a module as a workload."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from pybatch.base.errors import UsageError
from pybatch.records import AccumulationPlan
from pybatch.report.snippets import snippet
from pybatch.workloads.running.session import Session

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("default"),
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _imported():
    """Not above: every worker collects this file, and one runs it."""
    global pl, data, Module, trainer
    pl = pytest.importorskip("lightning.pytorch")
    from cases.lightning_training import Module, data, trainer


def test_the_callback_logs_to_the_trainers_loggers(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    from pybatch.integrations.lightning import NoiseScaleCallback

    ours, logger = NoiseScaleCallback(), CSVLogger(tmp_path)
    with pytest.raises(UsageError, match="has not begun"):
        _ = ours.noise
    made = trainer(tmp_path, [ours], 12, logger=logger, accumulate_grad_batches=2, log_every_n_steps=4)
    made.fit(Module())
    logger.save()
    found = ours.noise
    assert (found.source, found.steps) == ("micro-batches", 12)
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("noise/trace")
    step = rows[0].split(",").index("step")
    traces = {int(r[step]): float(r[column]) for r in (row.split(",") for row in rows[1:]) if r[column]}
    assert sorted(traces) == [4, 8, 12]
    assert traces[12] == pytest.approx(found.trace)
    again = NoiseScaleCallback()
    again.load_state_dict(ours.state_dict())
    trainer(tmp_path, [again], 14, accumulate_grad_batches=2).fit(Module())
    assert again.noise.steps > 12


def test_one_pass_a_step_is_measured_by_what_the_module_offers(tmp_path):
    """By exact per-example norms; its training_step is a forward pass there, and its own again after it."""
    from pybatch.integrations.lightning import NoiseScaleCallback

    ours, module = NoiseScaleCallback(), Module()
    trainer(tmp_path, [ours], 30).fit(module)
    assert ours.noise.source == "per-example"
    assert ours.noise.steps >= 2
    assert "training_step" not in vars(module)


@pytest.mark.parametrize("margin", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("end", [1, 2, 3, 37, 129, 200, 1000])
@pytest.mark.parametrize("start", [1, 2, 64])
def test_the_search_ends_near_the_end_of_memory_at_a_size_that_was_run(start, end, margin):
    from pybatch.integrations.lightning import RESOLUTION, largest

    ran = {}

    def fits(n):
        ran[n] = n <= end
        return n if ran[n] else None

    found = largest(fits, start, 512, margin)
    most = max(1, int(end * (1 - margin))) if end < 512 else 512
    assert ran[found]
    assert (1 - 1.5 * RESOLUTION) * most - 1 <= found <= most
    assert len(ran) < 20


def test_a_batch_size_is_found_that_was_run(tmp_path):
    from pybatch.integrations.lightning import RESOLUTION, BatchSizeFinder

    fits, margin = 37, 0.05
    finder, module = BatchSizeFinder(margin=margin), Module(fits)
    before = [p.detach().clone() for p in module.parameters()]
    drawn = []

    class Look(pl.Callback):
        """What the search leaves, and what was before it."""

        def on_fit_start(self, trainer, module):
            modes = [each.training for each in module.modules()]
            numbers = random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
            drawn.append((modes, numbers, module.seen[:], module.count, module.held["ema"].tolist()))

    Module.ran.clear()
    made = trainer(tmp_path, [Look(), finder, Look()], steps=0)
    made.fit(module)
    assert drawn[0] == drawn[1]
    assert module.trainer is made
    assert "log" not in vars(module)
    assert all(torch.equal(p, q) for p, q in zip(before, module.parameters(), strict=True))
    assert module.batch_size == finder.batch_size
    assert finder.tried[finder.batch_size]
    assert finder.batch_size in Module.ran
    most = max(1, int(fits * (1 - margin)))
    assert (1 - 1.5 * RESOLUTION) * most - 1 <= finder.batch_size <= most
    assert not any(ran for n, ran in finder.tried.items() if n > fits)


def test_where_the_data_or_the_range_end_there_is_no_margin(tmp_path):
    from pybatch.integrations.lightning import BatchSizeFinder, largest

    finder, module = BatchSizeFinder(most=64), Module()
    trainer(tmp_path, [finder], steps=1).fit(module)
    assert (finder.batch_size, module.seen[-1]) == (64, 64)  # and it is trained with
    few = Module(examples=50)
    finder = BatchSizeFinder()
    trainer(tmp_path, [finder], steps=0).fit(few)
    assert finder.batch_size == 50
    with pytest.raises(UsageError, match="a single example"):
        largest(lambda n: None, 8, 64, 0.05)


def test_memory_that_shrinks_while_it_is_looked_at_gives_no_size_that_failed():
    """What ran once fails when it is run again: the answer still ran, the last time it was tried."""
    from pybatch.integrations.lightning import largest

    ran, limit = {}, [100]

    def fits(n):
        limit[0] -= 2
        ran[n] = n <= limit[0]
        return n if ran[n] else None

    assert ran[largest(fits, 2, 1024, 0.05)]


def test_under_ddp_all_devices_agree(tmp_path):
    """Two processes, of which one has less memory: the answer fits both."""
    from pybatch.integrations.lightning import BatchSizeFinder

    class Uneven(Module):
        def training_step(self, batch, i):
            self.fits = 21 if self.global_rank else 10**9
            return super().training_step(batch, i)

        def on_fit_start(self):  # after the callbacks'
            (tmp_path / f"found{self.global_rank}").write_text(str(self.batch_size))

    finder = BatchSizeFinder(margin=0.0)
    made = trainer(tmp_path, [finder], steps=1, devices=2, strategy="ddp_fork")
    made.fit(Uneven())
    found = {int((tmp_path / f"found{rank}").read_text()) for rank in (0, 1)}
    assert len(found) == 1
    assert 19 <= found.pop() <= 21


def test_what_cannot_be_searched_is_refused(tmp_path):
    from pybatch.integrations.lightning import BatchSizeFinder

    class Without(Module):
        train_dataloader = pl.LightningModule.train_dataloader

    class Broken(Module):
        def training_step(self, batch, i):
            raise RuntimeError("a bug")

    manual = Module()
    manual.automatic_optimization = False
    with pytest.raises(UsageError, match=r"Define train_dataloader\(\) by self.batch_size"):
        trainer(tmp_path, [BatchSizeFinder()]).fit(Without(), DataLoader(data(), batch_size=4))
    with pytest.raises(UsageError, match="has 'size'"):
        trainer(tmp_path, [BatchSizeFinder(name="size")]).fit(Module())
    with pytest.raises(UsageError, match="automatic optimization"):
        trainer(tmp_path, [BatchSizeFinder()]).fit(manual)
    for more in ({"start": 0}, {"margin": 1.0}, {"steps": 0}):
        with pytest.raises(UsageError, match=next(iter(more))):
            BatchSizeFinder(**more)
    with pytest.raises(RuntimeError, match="a bug"):
        trainer(tmp_path, [BatchSizeFinder()]).fit(Broken())


def test_a_module_as_a_workload():
    from pybatch.integrations.lightning import workload

    module = Module()
    work = workload(module, unit="points")
    before = copy.deepcopy(module)
    nn.init.zeros_(module.body[0].weight)  # it is trained after
    session, module = Session(work, CPU), before
    info = session.info
    assert (info.name, info.unit, info.examples, info.reference_batch) == ("module", "points", 512, 4)
    assert (info.optimizer, info.learning_rate) == ("adamw", 0.01)
    batch = session.batch(8)
    session.model.eval()
    wanted = nn.functional.cross_entropy(module.eval().body(batch[0]), batch[1])
    assert torch.equal(session.loss(batch), wanted)
    several = Module()
    several.configure_optimizers = lambda: [torch.optim.SGD(several.parameters(), lr=0.1) for _ in range(2)]
    with pytest.raises(UsageError, match="not one optimizer"):
        workload(several)


def test_the_plans_options_are_lightnings_own():
    made = {}
    exec(snippet(AccumulationPlan(96, 1, 16, 6, None), "lightning"), made)
    assert made["trainer"].accumulate_grad_batches == 6
    assert made["trainer"].num_devices == 1


def test_a_batch_schedule_switches_at_its_examples(tmp_path):
    from pybatch.integrations.lightning import BatchScheduleCallback

    stages = [(0, 8), (24, 16), (96, 32)]
    callback = BatchScheduleCallback(stages, rate="linear")
    module = Module(examples=64)
    tried = trainer(tmp_path, [callback], steps=9, max_epochs=-1)
    passes = []

    class Count(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            passes.append(len(module.seen))

    tried.callbacks.append(Count())
    tried.fit(module)
    sizes = [4 * (b - a) for a, b in zip([0, *passes], passes, strict=False)]
    assert sizes == [8, 8, 8, 8, 16, 16, 16, 16, 32]
    assert callback.schedule.examples == sum(sizes)
    assert callback.schedule.batch == 32
    assert tried.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)
    assert tried.accumulate_grad_batches == 1
    other = BatchScheduleCallback(stages)
    other.load_state_dict(callback.state_dict())
    again = trainer(tmp_path, [other], steps=1)
    again.fit(Module(examples=64))
    assert other.schedule.steps == 10


def test_a_step_that_waits_for_its_epoch_is_not_put_off_for_good(tmp_path):
    from pybatch.integrations.lightning import BatchScheduleCallback

    callback = BatchScheduleCallback([(0, 4), (8, 8)])
    trainer(tmp_path, [callback], steps=8, max_epochs=-1).fit(Module(examples=12))
    assert callback.schedule.batch == 8
    assert callback.schedule.examples == 12 + 12 * 2 + 8  # epochs of 3 steps of 4, then of 8 and of the 4 that are left


def test_a_stream_has_no_epochs_to_divide(tmp_path):
    from pybatch.integrations.lightning import BatchScheduleCallback

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(data(512))

    class Streaming(Module):
        def train_dataloader(self):
            return DataLoader(Stream(), batch_size=4)

    callback = BatchScheduleCallback([(0, 4), (8, 16)])
    trainer(tmp_path, [callback], steps=5).fit(Streaming())
    assert (callback.schedule.batch, callback.schedule.examples) == (16, 4 * 4 + 16)


@pytest.mark.parametrize(
    ("examples", "stages", "says"), [(14, [(0, 8)], "drop_last=True"), (12, [(0, 16)], "longer than an epoch of 3")]
)
def test_a_schedule_that_cannot_be_kept_is_refused(tmp_path, examples, stages, says):
    from pybatch.integrations.lightning import BatchScheduleCallback

    with pytest.raises(UsageError, match=says):
        trainer(tmp_path, [BatchScheduleCallback(stages)]).fit(Module(examples=examples))
