"""What is checked before anything runs: options against the workload, its first losses, and what it is."""

from __future__ import annotations

import dataclasses

import torch

from pybatch import scaling
from pybatch.base.errors import UsageError
from pybatch.device.identity import describe
from pybatch.records import Note
from pybatch.sweep.budget import checked_budget
from pybatch.sweep.contents import Subject
from pybatch.sweep.options import SweepOptions
from pybatch.sweep.search import default_rates
from pybatch.training.fingerprint import fingerprint
from pybatch.training.schedules import CONSTANT
from pybatch.training.task import initial_losses
from pybatch.training.trajectory import SMOOTHING, metric_of
from pybatch.training.trial import Trial
from pybatch.training.updates import arguments_of
from pybatch.workloads.base import Workload
from pybatch.workloads.running.choice import OWN, is_own
from pybatch.workloads.running.optimizers import has_own, public
from pybatch.workloads.running.session import Session, checked_dtype


def settled(options: SweepOptions, workload: Workload) -> SweepOptions:
    """The options with all that the workload and the optimizer decide: targets, base batch, hyper-parameters, rates.

    Raises:
        UsageError: an option that cannot work with them.
    """
    checked_dtype(options.dtype)
    session = Session(workload, torch.device("cpu"), seed=options.seed)  # on which its own optimizer shows itself
    optimizer = options.optimizer or (OWN if has_own(workload) else workload.swept_by)
    group = arguments_of(session, optimizer, options.options)
    if is_own(optimizer):
        optimizer = f"{OWN}:{public(optimizer, session.own_optimizer())}"
    if options.schedule == OWN and not workload.brings("schedule"):
        raise UsageError(
            f"schedule 'own': workload {workload.name!r} has none. Name one, such as 'cosine', or define schedule()."
        )
    whole = dataclasses.replace(
        options,
        target=workload.target if options.target is None else options.target,
        base_batch=options.start_batch,
        optimizer=optimizer,
        schedule=options.schedule or (OWN if workload.brings("schedule") else CONSTANT),
        options={name: value for name, value in group.items() if name != "lr"},
        rates=default_rates(optimizer, group) if options.rates is None else options.rates,
    )
    if not whole.targets:
        raise UsageError(f"workload {workload.name!r} names no target loss. Give one by --target, such as train=0.1.")
    for name in filter(metric_of, whole.targets):
        if metric_of(name) not in workload.better:
            raise UsageError(
                f"target {name}={whole.targets[name]:g}: workload {workload.name!r} does not say which way "
                f"{metric_of(name)} goes. Give metrics() and better = {{'{metric_of(name)}': 'higher'}}, or 'lower'."
            )
    checked_budget(whole.gap_epochs, workload.examples, whole.batches, whole.max_steps)
    for rule in whole.rules:
        scaling.scale(rule, {**whole.options, "lr": 1.0}, whole.start_batch, scaling.Base(whole.start_batch))
    scaling.followed(whole.options, 1, 1, whole.beta2_rule, whole.decay_rule)
    return whole


def check_start(workload: Workload, options: SweepOptions, device: torch.device) -> None:
    """Raise UsageError where a target is met before the first step: steps to it would say nothing.

    WorkloadError where there is no loss to start from.
    """
    start = scaling.Scaled({**options.options, "lr": 1.0})
    trial = Trial("", options.trained_by, start, options.batches[0], options.seed, options.dtype, device.type)
    losses = initial_losses(workload, trial, device, [name for name in options.targets if metric_of(name)])
    for split, target in options.targets.items():
        metric = metric_of(split)
        higher = workload.better.get(metric or "") == "higher"
        if losses[split] >= target if higher else losses[split] <= target:
            raise UsageError(
                f"target {split}={target:g} is met before the first step: the {metric or 'loss'} starts at "
                f"{losses[split]:.3g}. Give a {'higher' if higher else 'lower'} target."
            )


def subject_of(workload: Workload, options: SweepOptions, device: torch.device) -> Subject:
    """What is trained, and where."""
    session = Session(workload, torch.device("cpu"), options.dtype)
    notes = []
    if any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in session.model.modules()):
        text = (
            "the model has BatchNorm: its statistics are of the whole batch, so a larger batch also regularizes less. "
            "Use ghost batches or another norm to tell the two apart"
        )
        notes.append(Note("curves.critical_batch", text))
    return Subject(
        fingerprint(workload),
        dataclasses.replace(session.info, target={}, learning_rate=None, optimizer=None, optimizer_options={}),
        describe(device),
        f"{SMOOTHING}; {workload.evaluation_examples} examples in each fixed batch",
        tuple(notes),
    )
