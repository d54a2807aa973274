"""transformers: the noise scale of a Trainer's run where it logs, its batch by a schedule, a Trainer as a workload."""

from __future__ import annotations

import copy
import gc
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler

from pybatch.base.errors import UsageError
from pybatch.base.plain import given
from pybatch.integrations.figures import groups_by_place, logged, made_again, token_weights
from pybatch.noise import attach
from pybatch.records import NoiseScale
from pybatch.schedule import BatchSchedule, passes_of
from pybatch.workloads.base import Workload

_STATE = "batch_schedule.json"  # beside a checkpoint


class NoiseScaleCallback(TrainerCallback):
    """The gradient noise scale in every log of the Trainer: its history, TensorBoard, W&B, whatever `report_to` names.

        trainer = Trainer(..., callbacks=[NoiseScaleCallback()])

    A Trainer with `gradient_accumulation_steps` of two or more has the pairs of norms as it is, and so has one over
    several processes; another is measured by per-example norms or Adam's moments, see `pybatch.noise.attach`. After the
    training `noise` has the scale, and the last log its figures.

    Args:
        attached: arguments of `pybatch.noise.attach`.
    """

    def __init__(self, **attached: Any) -> None:
        self._attached = attached
        self.handle: Any = None

    @property
    def noise(self) -> NoiseScale:
        """The noise scale so far; UsageError before the training begins."""
        if self.handle is None:
            raise UsageError("the training has not begun: there is no noise scale yet. Call trainer.train().")
        found: NoiseScale = self.handle.noise
        return found

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach, and go before those who log."""
        handler, trainer = _found(self)
        handler.callbacks.remove(self)
        handler.callbacks.insert(0, self)
        model = trainer.model_wrapped if dist.is_initialized() else kwargs["model"]
        self.handle = attach(model, kwargs["optimizer"], **self._attached)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the noise scale to a log of the training loss, or of the training's end."""
        if self.handle is None or logs is None or not ({"loss", "train_loss"} & set(logs)):
            return
        figures = logged(self.noise)
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks off."""
        if self.handle is not None:
            self.handle.detach()


class BatchScheduleCallback(TrainerCallback):
    """The batch size by a schedule, as gradient accumulation; the rate follows within the optimizer's step alone.

        arguments = TrainingArguments(gradient_accumulation_steps=1, num_train_epochs=..., ...)
        trainer = Trainer(..., callbacks=[BatchScheduleCallback([(0, 64), (200_000, 128)], steps=5000)])

    The Trainer plans its epochs before the training, by one number of passes a step: it must be 1, and
    `num_train_epochs` enough for all examples; `steps` ends the training. A switch waits until the batches of the epoch
    divide into steps of the new size, or for the next epoch. Each checkpoint holds the schedule's state.

    Args:
        stages: as for `pybatch.schedule.BatchSchedule`.
        steps: after which the training ends; None: the Trainer's `max_steps`.
        resume: a checkpoint of the Trainer to go on from. The Trainer finds its place in the data by a fixed number of
            passes a step: resume with `ignore_data_skip=True`.
        options: further arguments of `BatchSchedule`.
    """

    def __init__(
        self, stages: Any, *, steps: int | None = None, resume: str | Path | None = None, **options: Any
    ) -> None:
        self._stages, self._resume, self._options = stages, resume, options
        self._steps = steps
        self.schedule: BatchSchedule | None = None
        self._passes = 0  # of the epoch so far
        self._trainer: Trainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin, or go on; UsageError for a training that would end early, or whose examples can't be counted."""
        if self.schedule is not None:  # of a training that failed
            self.schedule.detach()
        if state.global_step and (self._resume is None or not args.ignore_data_skip):
            raise UsageError(
                "a resumed training needs the place of its schedule and of its data. Give resume=CHECKPOINT to "
                "BatchScheduleCallback, and ignore_data_skip=True to TrainingArguments."
            )
        if args.gradient_accumulation_steps != 1:
            raise UsageError(
                f"gradient_accumulation_steps={args.gradient_accumulation_steps}: the Trainer plans its epochs by it, "
                "and the schedule changes it. Give 1."
            )
        optimizer = kwargs["optimizer"]
        self.schedule = BatchSchedule(
            self._stages,
            getattr(optimizer, "optimizer", optimizer),
            micro_batch=args.train_batch_size,
            devices=args.world_size,
            **self._options,
        )
        if self._resume is not None:
            self.schedule.load_state_dict(json.loads((Path(self._resume) / _STATE).read_text()))
        try:
            self._check(args, state, kwargs["train_dataloader"])
        except UsageError:
            self.schedule.detach()
            raise
        self._set(args)

    def _check(self, args: Any, state: Any, loader: Any) -> None:
        """That the Trainer's epochs hold the schedule's steps."""
        assert self.schedule is not None
        try:
            batches, examples = len(loader), len(loader.dataset)
        except TypeError:  # a stream: it has no epochs to run out of
            return
        share = args.train_batch_size * args.world_size
        if not args.dataloader_drop_last and examples % share:
            raise UsageError(
                f"the last batch of an epoch of {examples} examples is smaller than {share}, and a schedule counts "
                "whole ones. Give dataloader_drop_last=True."
            )
        longest, needed = passes_of(self.schedule, self._steps or state.max_steps, batches)
        if longest > batches:
            raise UsageError(
                f"a step of {longest} passes is longer than an epoch of {batches}. Raise per_device_train_batch_size."
            )
        planned = (state.num_train_epochs - int(state.epoch or 0)) * batches
        if needed > planned:
            raise UsageError(
                f"the schedule's {self._steps or state.max_steps} steps take {needed} passes, and the Trainer plans "
                f"{planned}: it would end early. Leave max_steps out, give steps= to BatchScheduleCallback, and "
                f"num_train_epochs={-(-needed // batches)}."
            )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Passes are counted anew, and a switch that waited is made."""
        assert self.schedule is not None
        self._passes = 0
        self.schedule.switch()
        self._set(args)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step was taken."""
        assert self.schedule is not None
        self._trainer = self._trainer or _found(self)[1]
        made = self._trainer.current_gradient_accumulation_steps
        self._passes += made
        self.schedule.step(made, lambda passes: self._passes % passes == 0)
        self._set(args)
        if self._steps is not None and state.global_step >= self._steps:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the batch size to what is logged of training."""
        if self.schedule is not None and logs is not None and "loss" in logs:
            logs["batch_size"] = self.schedule.batch
            if state.log_history:
                state.log_history[-1]["batch_size"] = self.schedule.batch

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save where it stands beside the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.schedule is not None and state.is_world_process_zero and folder.is_dir():
            (folder / _STATE).write_text(json.dumps(self.schedule.state_dict()))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks off, and give the Trainer back its passes a step."""
        if self.schedule is not None:
            self.schedule.detach()
            args.gradient_accumulation_steps = 1

    def _set(self, args: Any) -> None:
        assert self.schedule is not None
        args.gradient_accumulation_steps = self.schedule.accumulation


def workload(trainer: Trainer, **more: Any) -> Workload:
    """A Trainer's model, data set, collator, loss, optimizer, schedule and workers as a workload.

    Its model is copied as it is now, or made by `model_init`. The loss is `trainer.compute_loss`: a mean over the
    tokens of a batch counts examples by their labels. fp16 and bf16 are the measurement's own `dtype`.

    Args:
        trainer: that could train.
        more: `test`, `name`, `unit`, ...: as for `Workload.from_parts`.

    Raises:
        UsageError: its data set has no indices.
    """
    if not isinstance(trainer, Trainer):
        raise UsageError(f"workload(): trainer is {given(trainer)}. Give a transformers.Trainer that could train.")
    loader = trainer.get_train_dataloader()
    arguments, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    compute: Any = trainer.compute_loss
    own = [p for p in model.parameters() if p.requires_grad]
    before = trainer.optimizer
    made: Any = trainer.create_optimizer()
    inner = getattr(made, "optimizer", made)
    trainer.optimizer = before
    groups, kind, defaults = groups_by_place(inner, own), type(inner), copy.deepcopy(inner.defaults)

    def schedule(optimizer: torch.optim.Optimizer, steps: int) -> Any:
        kept, trainer.lr_scheduler = trainer.lr_scheduler, None
        try:
            return trainer.create_scheduler(steps, optimizer)
        finally:
            trainer.lr_scheduler = kept

    accumulated = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    usual: dict[str, Any] = {
        "name": type(model).__name__.lower(),
        "test": trainer.eval_dataset,
        "schedule": schedule if trainer.lr_scheduler is None else None,
        "reference_batch": accumulated * max(1, arguments.world_size),
        "example_weights": token_weights,
    }
    return Workload.from_parts(
        model=(lambda: trainer.call_model_init()) if trainer.model_init is not None else model,
        train=loader.dataset,
        collate_fn=loader.collate_fn,
        loss=lambda model, batch: compute(model, batch),
        optimizer=lambda params: made_again(kind, defaults, groups, params),
        num_workers=arguments.dataloader_num_workers,
        **{**usual, **more},
    )


def _found(callback: TrainerCallback) -> tuple[Any, Any]:
    """The handler that calls this callback, and its Trainer: callbacks are told of neither."""
    objects: list[Any] = gc.get_objects()
    for handler in objects:
        if issubclass(type(handler), CallbackHandler) and any(own is callback for own in handler.callbacks):
            for trainer in objects:
                if issubclass(type(trainer), Trainer) and getattr(trainer, "callback_handler", None) is handler:
                    return handler, trainer
    raise UsageError(
        f"{type(callback).__name__} is not among the callbacks of a Trainer. Give it by Trainer(callbacks=[...])."
    )
