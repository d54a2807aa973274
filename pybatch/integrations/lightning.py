"""Lightning: the noise scale of a fit, its batch by a schedule, the largest that was run, a module as a workload."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.parsing import lightning_hasattr, lightning_setattr
from torch.utils._pytree import tree_leaves

from pybatch.base.errors import UsageError
from pybatch.base.plain import given
from pybatch.device.memory import release
from pybatch.integrations.figures import groups_by_place, logged, made_again
from pybatch.noise import attach
from pybatch.records import NoiseScale
from pybatch.schedule import BatchSchedule, passes_of
from pybatch.watch.state import put_back
from pybatch.workloads.base import Workload
from pybatch.workloads.given import own_copy
from pybatch.workloads.running.session import is_out_of_memory

_NONE_FITS = "memory runs out with a single example. Make the model smaller, or checkpoint activations."
RESOLUTION = 0.05  # of the batch: how near the end of memory is sought


class NoiseScaleCallback(Callback):
    """The gradient noise scale as `noise/b_simple`, ... in whatever logger the Lightning Trainer has.

    With `accumulate_grad_batches` of two or more, or over several processes, the pairs of norms are there as it is;
    else per-example norms or Adam's moments give it, see `pybatch.noise.attach`.

    Args:
        every: steps between two readings, each of which waits for the device; None: the Trainer's `log_every_n_steps`.
        optimizer_index: which of several optimizers.
        attached: further arguments of `pybatch.noise.attach`.
    """

    def __init__(self, every: int | None = None, *, optimizer_index: int = 0, **attached: Any) -> None:
        if every is not None and every < 1:
            raise UsageError(f"every {every}: give the steps between readings, 1 or more.")
        self.every, self.index, self._attached = every, optimizer_index, attached
        self.handle: Any = None
        self._stepped: pl.LightningModule | None = None
        self._state: dict[str, Any] | None = None
        self._read = -1

    @property
    def noise(self) -> NoiseScale:
        """The noise scale so far; UsageError before the fit begins."""
        if self.handle is None:
            raise UsageError("the fit has not begun: there is no noise scale yet. Call trainer.fit().")
        found: NoiseScale = self.handle.noise
        return found

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach to the model as the strategy has wrapped it; to a bare one by way of its training steps."""
        model: torch.nn.Module = trainer.strategy.model or pl_module
        if model is pl_module:
            model = _Steps(pl_module)
            object.__setattr__(pl_module, "training_step", model.__call__)
            self._stepped = pl_module
        self.handle = attach(model, trainer.optimizers[self.index], **self._attached)
        if self._state is not None:
            self.handle.load_state_dict(self._state)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Read and log, every so many steps."""
        step, every = trainer.global_step, self.every or int(getattr(trainer, "log_every_n_steps", 50))
        if step == self._read or not step or step % max(1, every):
            return
        self._read = step
        figures = logged(self.noise)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the hooks off."""
        if self._stepped is not None:
            object.__delattr__(self._stepped, "training_step")
            self._stepped = None
        if self.handle is not None:
            self.handle.detach()

    def state_dict(self) -> dict[str, Any]:
        """The statistics, for a checkpoint."""
        return self.handle.state_dict() if self.handle is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's."""
        self._state = state_dict or None


class _Steps(torch.nn.Module):
    """The training steps of a module as forward passes, where hooks look: they need not call its own forward()."""

    def __init__(self, module: pl.LightningModule) -> None:
        super().__init__()
        self.module = module
        self._step = module.training_step

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's training_step."""
        return self._step(*args, **kwargs)


class BatchScheduleCallback(Callback):
    """The batch size by a schedule, as gradient accumulation; the rate follows within the optimizer's step alone.

    `max_steps` is that of the schedule. A switch waits until the batches of the epoch divide into steps of the new
    size, or for the next epoch; the loader drops its last, smaller batch. The state is in Lightning's checkpoints.

    Args:
        stages: as for `pybatch.schedule.BatchSchedule`.
        micro_batch: examples of a batch of the loader; None: its `batch_size`.
        options: further arguments of `BatchSchedule`.
    """

    def __init__(self, stages: Any, *, micro_batch: int | None = None, **options: Any) -> None:
        self._stages, self._micro_batch, self._options = stages, micro_batch, options
        self.schedule: BatchSchedule | None = None
        self._state: dict[str, Any] | None = None
        self._steps = self._passes = 0  # of the Trainer so far; passes since its last step
        self._before = 1  # of the Trainer, passes a step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin, or go on."""
        if not pl_module.automatic_optimization:
            raise UsageError(
                "BatchScheduleCallback needs automatic optimization. By hand, drive the loop by BatchSchedule."
            )
        size = self._micro_batch or getattr(trainer.train_dataloader, "batch_size", None)
        if not size:
            raise UsageError("the loader has no batch_size. Give BatchScheduleCallback micro_batch=.")
        loader: Any = trainer.train_dataloader
        try:
            examples = len(loader.dataset)
        except (AttributeError, TypeError):  # a stream: it has no epochs
            examples = 0
        if not getattr(loader, "drop_last", False) and examples % (size * trainer.world_size):
            raise UsageError(
                f"the last batch of an epoch of {examples} examples is smaller than {size}, and a schedule "
                "counts whole ones. Make the loader with drop_last=True."
            )
        optimizer: Any = trainer.optimizers[0]
        if self.schedule is not None:  # of a fit that failed
            self.schedule.detach()
        self._passes, self._before = 0, trainer.accumulate_grad_batches
        self.schedule = BatchSchedule(
            self._stages, optimizer, micro_batch=size, devices=trainer.world_size, **self._options
        )
        if self._state is not None:
            self.schedule.load_state_dict(self._state)
        batches = trainer.num_training_batches
        longest = passes_of(self.schedule, trainer.max_steps, int(batches))[0] if math.isfinite(batches) else 0
        if longest > batches:
            self.schedule.detach()
            raise UsageError(
                f"a step of {longest} passes is longer than an epoch of {batches}. Raise the loader's batch_size."
            )
        self._steps = trainer.global_step
        trainer.accumulate_grad_batches = self.schedule.accumulation

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A switch that waited is made: the epoch's batches are counted anew."""
        if self.schedule is not None:
            self.schedule.switch()
            trainer.accumulate_grad_batches = self.schedule.accumulation

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """A pass was made, and maybe a step taken."""
        assert self.schedule is not None
        self._passes += 1
        if trainer.global_step == self._steps:
            return
        self._steps, passes, self._passes = trainer.global_step, self._passes, 0
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        self.schedule.step(passes, lambda passes: ready % passes == 0)
        trainer.accumulate_grad_batches = self.schedule.accumulation

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the hooks off, and give the Trainer back its passes a step."""
        if self.schedule is not None:
            self.schedule.detach()
            trainer.accumulate_grad_batches = self._before

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """As at the end."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, for a checkpoint."""
        return self.schedule.state_dict() if self.schedule is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's."""
        self._state = state_dict or None


class BatchSizeFinder(Callback):
    """Find the largest batch of which whole training steps run, and train with it: on one device, or each of DDP's.

    The size is written to `batch_size` of the module or its data module, as Lightning's own finder does. It has always
    been run itself: where memory ended the search, the margin is taken off and the smaller batch run once more.
    Afterwards all of the module is as before, to a depth of 8 within its attributes; so are the optimizers, and the
    generators of torch, NumPy and Python. What lies elsewhere keeps what the steps on trial did: the data module, data
    sets, globals, files. Learning rates are 0 on trial.

    Args:
        start: the first size.
        most: the largest that is tried.
        margin: share that is taken off where memory ended the search, for what varies from batch to batch.
        steps: training steps of every size.
        name: of the attribute that has the batch size.
    """

    def __init__(
        self, start: int = 2, most: int = 8192, margin: float = 0.05, steps: int = 3, name: str = "batch_size"
    ) -> None:
        if not 1 <= start <= most:
            raise UsageError(f"start {start}: give a batch from 1 to most, {most}.")
        if not 0 <= margin < 1:
            raise UsageError(f"margin {margin:g} is no share. Give a number from 0 to below 1, such as 0.05.")
        if steps < 1:
            raise UsageError(f"steps {steps}: give 1 or more, for states that a first step makes.")
        self.start, self.most, self.margin, self.steps, self.name = start, most, margin, steps, name
        self.batch_size: int | None = None
        self.tried: dict[int, bool] = {}  # batch sizes, and whether their steps ran

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Search, before the first loader is made."""
        source = self._source(trainer, pl_module)

        def fits(n: int) -> int | None:
            found = self._run(trainer, pl_module, source, n)
            self.tried[n] = found is not None
            return found

        with _on_trial(trainer, pl_module):
            self.batch_size = largest(fits, self.start, self.most, self.margin)
        lightning_setattr(pl_module, self.name, self.batch_size)

    def _source(self, trainer: pl.Trainer, module: pl.LightningModule) -> Any:
        """What makes the loaders; UsageError for a training that the search cannot run."""
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            kind = type(trainer.strategy).__name__
            raise UsageError(f"BatchSizeFinder runs on one device or under DDP, not under {kind}. Give a batch size.")
        if not module.automatic_optimization:
            raise UsageError("BatchSizeFinder needs automatic optimization: by hand, steps cannot be put back.")
        if not lightning_hasattr(module, self.name):
            raise UsageError(f"neither module nor data module has {self.name!r}. Give it one, and make loaders by it.")
        source = getattr(trainer, "datamodule", None) or module
        own = type(source).train_dataloader
        if own in (pl.LightningModule.train_dataloader, pl.LightningDataModule.train_dataloader):
            raise UsageError(
                "the loaders given to fit() have a batch size of their own. Define train_dataloader() by "
                f"self.{self.name}."
            )
        return source

    def _run(self, trainer: pl.Trainer, module: pl.LightningModule, source: Any, n: int) -> int | None:
        """Steps of n examples: how many there were, or None where memory ran out on any device."""
        lightning_setattr(module, self.name, n)
        size, ran = 0, True
        try:
            size = self._steps(trainer, module, next(iter(source.train_dataloader())))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            ran = False
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if not ran or trainer.strategy.root_device.type == "cuda":
            release(trainer.strategy.root_device)
        return size if trainer.strategy.reduce_boolean_decision(ran, all=True) else None

    def _steps(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> int:
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        for _ in range(self.steps):
            with trainer.precision_plugin.train_step_context():
                loss = _loss(module, batch)
            # Past the wrapper of DDP: a device that runs out must not leave the others waiting in a reduction.
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in trainer.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return _examples(batch)


def _examples(batch: Any) -> int:
    """Dimension 0 of a batch's first tensor."""
    sizes = (len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.ndim)
    if (found := next(sizes, None)) is None:
        raise UsageError(f"a batch is a {type(batch).__name__} without a tensor to count examples in. Give it one.")
    return found


def largest(fits: Callable[[int], int | None], start: int, most: int, margin: float) -> int:
    """The largest batch that was run, less the margin where memory ended the search.

    Args:
        fits: runs a batch of so many examples; the number that there were, fewer where the data end, or None.
        start, most: sizes to begin and to end with.
        margin: share taken off.

    Raises:
        UsageError: one example does not fit.
    """
    good, bad, n = 0, most + 1, start
    while good < most and bad > most:
        found = fits(n)
        if found is None:
            bad = n
        elif found < n:  # the data end here
            return found if fits(found) is not None else largest(fits, max(1, found // 2), found, margin)
        else:
            good, n = n, min(2 * n, most)
    if bad > most:
        return good
    while bad - good > max(1, RESOLUTION * good) or not good:
        if bad == 1:
            raise UsageError(_NONE_FITS)
        middle = max(1, (good + bad) // 2)
        if fits(middle) is None:
            bad = middle
        else:
            good = middle
    n = good
    while True:
        n = max(1, int(n * (1 - margin)))
        if n == good or fits(n) is not None:
            return n
        if n == 1:
            raise UsageError(_NONE_FITS)


def workload(module: pl.LightningModule, data: Any = None, **more: Any) -> Workload:
    """A LightningModule as a workload: its training_step, configure_optimizers and training loader.

    Args:
        module: its weights now are where every training begins.
        data: a LightningDataModule or a DataLoader; None: the module's own train_dataloader().
        more: `test`, `name`, `unit`, ...: as for `Workload.from_parts`.

    Raises:
        UsageError: manual optimization, several optimizers, or a data set without indices.
    """
    if not isinstance(module, pl.LightningModule):
        raise UsageError(f"workload(): module is {given(module)}. Give a LightningModule.")
    if not module.automatic_optimization:
        raise UsageError("a module that optimizes by hand cannot be run as a workload. Return its loss instead.")
    if isinstance(data, pl.LightningDataModule):
        data.prepare_data()
        data.setup("fit")
    loader = data if isinstance(data, torch.utils.data.DataLoader) else (data or module).train_dataloader()
    if not isinstance(loader, torch.utils.data.DataLoader):
        raise UsageError(f"train_dataloader() gives a {type(loader).__name__}. Give one DataLoader.")
    optimizer = _optimizer(module.configure_optimizers())
    groups = groups_by_place(optimizer, [p for p in module.parameters() if p.requires_grad])
    kind, defaults = type(optimizer), copy.deepcopy(optimizer.defaults)
    kept: Any = own_copy(module)
    kept.log = kept.log_dict = lambda *args, **kwargs: None
    return Workload.from_parts(
        model=lambda: copy.deepcopy(kept),
        train=loader.dataset,
        collate_fn=loader.collate_fn,
        loss=lambda model, batch: _loss(model, batch),
        optimizer=lambda params: made_again(kind, defaults, groups, params),
        num_workers=loader.num_workers,
        **{"name": type(module).__name__.lower(), "reference_batch": loader.batch_size or 32, **more},
    )


def _optimizer(given: Any) -> torch.optim.Optimizer:
    """The one optimizer of what configure_optimizers() returned."""
    if isinstance(given, Mapping):
        given = given["optimizer"]
    while isinstance(given, list | tuple) and given and (len(given) == 1 or isinstance(given[0], list | tuple)):
        given = given[0]
    if isinstance(given, Mapping):
        given = given["optimizer"]
    if not isinstance(given, torch.optim.Optimizer):
        raise UsageError(f"configure_optimizers() gives {type(given).__name__}, not one optimizer. Give one alone.")
    return given


def _loss(module: Any, batch: Any) -> torch.Tensor:
    """The loss of a training step."""
    takes = len(inspect.signature(module.training_step).parameters)
    found = module.training_step(batch, 0) if takes > 1 else module.training_step(batch)
    loss = found["loss"] if isinstance(found, Mapping) else found
    if not isinstance(loss, torch.Tensor):
        raise UsageError(f"training_step() gives {type(found).__name__}, not a loss. Return it, or {{'loss': loss}}.")
    return loss


@contextmanager
def _on_trial(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """In this context the module is trained on trial, and logs nothing; all of it is put back."""
    with put_back(module, trainer.optimizers, apart=(trainer, getattr(trainer, "datamodule", None))):
        quiet: Any = lambda *args, **kwargs: None  # noqa: E731
        module.log, module.log_dict = quiet, quiet
        module.train()
        yield
