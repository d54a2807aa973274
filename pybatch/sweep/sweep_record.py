"""The record of a sweep, from the contests that are over."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch

from pybatch.device.identity import describe
from pybatch.records import Convergence, Curve, NoiseScale, Note
from pybatch.sweep import live
from pybatch.sweep.budget import Budget, with_losses
from pybatch.sweep.contest import Contest
from pybatch.sweep.plan import Plan
from pybatch.sweep.summary import curve, unanswered
from pybatch.training.trajectory import SMOOTHING, SPLITS, Split
from pybatch.workloads.base import Workload
from pybatch.workloads.running.session import Session


def record(
    workload: Workload,
    plan: Plan,
    device: torch.device,
    contests: Sequence[Contest] = (),
    *,
    further: Sequence[Contest] = (),
    ended: bool = False,
    remarks: Iterable[str] = (),
    noise: NoiseScale | None = None,
    notes: tuple[Note, ...] = (),
) -> Convergence:
    """The record of all contests that are over.

    Args:
        workload: what was trained.
        plan: what was asked for.
        device: where.
        contests: all that were begun; none: of a sweep that begins, as the store keeps it.
        further: the same runs past their targets, where test losses at equal budgets are asked for.
        ended: whether nothing is left to run.
        remarks: on how the trials were run.
        noise: the gradient noise scale, for the ratio to it.
        notes: what else is to be said.
    """
    budget = plan.budget
    missing = [contest for contest in (*contests, *further) if not contest.over]
    if contests and not ended:
        names = ", ".join(_named(contest, budget) for contest in missing[:8])
        names = names or f"all that follows the base batch {plan.base_batch}"
        notes = (*notes, Note("curves", f"not finished: {names}{' and more' if len(missing) > 8 else ''}"))
    failed = [Note("curves.points", f"{_named(each, budget)}: {each.failed}") for each in further if each.failed]
    notes = (*notes, *failed, *(Note("trials", text) for text in remarks), *_confounds(workload, plan))
    splits = [split for split in SPLITS if split in plan.targets]
    session = Session(workload, torch.device("cpu"), plan.dtype)
    return Convergence(
        tuple(_curve(plan, contests, rule, split, noise) for rule in plan.rules for split in splits),
        notes,
        optimizer=plan.optimizer,
        seeds=len(plan.seeds),
        trials=len({key for contest in contests if contest.over for key in contest.trials}),
        base_batch=plan.base_batch,
        base_rate=plan.base_rate,
        smoothing=f"{SMOOTHING}; {workload.evaluation_examples} examples in each fixed batch",
        complete=ended and not any(contest.failed for contest in (*contests, *further)),
        device=describe(device),
        workload=dataclasses.replace(session.info, target=dict(plan.targets), learning_rate=None),
        gap_epochs=None if budget is None else budget.epochs,
        gap_steps=None if budget is None else budget.steps,
    )


def _named(contest: Contest, budget: Budget | None) -> str:
    end = f" to {budget.epochs:g} epochs" if contest.continues is not None and budget is not None else ""
    return f"batch {contest.batch} {contest.rule}{end}"


def _curve(plan: Plan, contests: Sequence[Contest], rule: str, split: Split, noise: NoiseScale | None) -> Curve:
    own = [c for c in contests if c.rule == rule and split in c.targets and c.over and c.batch in plan.batches]
    points, caps = [], {}
    failed: dict[str, list[int]] = {}
    for contest in sorted(own, key=lambda contest: contest.batch):
        if contest.failed:
            failed.setdefault(contest.failed, []).append(contest.batch)
            continue
        budget = plan.budget if split == plan.compared else None
        points.append(with_losses(contest.points(plan.seeds)[split], contest.outcomes, plan.seeds, budget))
        caps[contest.batch] = contest.race(plan.seeds, contest.outcomes).limit(split)
    notes = unanswered(failed)
    if points and all(p.steps is None for p in points):
        near = live.nearest(split, [outcome for contest in own for outcome in contest.outcomes])
        notes += [Note("points", near)] if near is not None else []
    return curve(rule, split, plan.targets[split], points, caps, noise, notes)


def _confounds(workload: Workload, plan: Plan) -> list[Note]:
    """What in the model or the data makes steps depend on the batch size by another way than gradient noise."""
    notes = []
    model = Session(workload, torch.device("cpu"), plan.dtype).model
    if any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        text = (
            "the model has BatchNorm: its statistics are of the whole batch, so a larger batch also regularizes less. "
            "Use ghost batches or another norm to tell the two apart"
        )
        notes.append(Note("curves.critical_batch", text))
    if plan.optimizer == "muon":
        text = "muon: every matrix is updated by Muon, embeddings and an output layer too, often left to AdamW"
        notes.append(Note("curves", text))
    over = [b for b in plan.batches if workload.examples is not None and b > workload.examples]
    if over:
        text = (
            f"batch {', '.join(map(str, over))} is larger than the data set of {workload.examples} examples: batches "
            "are drawn with replacement, so examples repeat within one"
        )
        notes.append(Note("curves.points", text))
    return notes
