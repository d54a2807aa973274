"""Experiments of one store that differ in their seeds alone, as one record with the seeds of all. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from pybatch.base import numerals as n
from pybatch.records import Curve, NoiseScale, Note, Run
from pybatch.scaling import SEARCHED
from pybatch.sweep.budget import with_losses
from pybatch.sweep.contents import Contents
from pybatch.sweep.experiment import experiments, pool_name
from pybatch.sweep.record import Assembly, point_of
from pybatch.sweep.summary import curve, steps_of
from pybatch.training.trajectory import Split
from pybatch.training.trial import Outcome


def records(contents: Contents, targets: Mapping[str, float] | None = None) -> list[Run]:
    """The record of every experiment of a store, at its own targets or at these; repeats with other seeds are pooled.

    A tuned point then takes the rates that any of the repeats' searches asked for at its batch size: each is an equal
    search at every batch size, and so are all together. Runs of another rule follow from the rate tuned at the base
    batch; where repeats found different ones they start from different places, and stay apart.
    """
    groups: dict[str, list[tuple[Assembly, Run]]] = {}
    for experiment in experiments(contents, targets):
        assembly = Assembly(experiment, contents)
        groups.setdefault(pool_name(experiment), []).append((assembly, assembly.run()))
    found: list[Run] = []
    for name, members in groups.items():
        if len(members) == 1:
            found.append(members[0][1])
        elif (why := _apart([assembly for assembly, _ in members])) is not None:
            found += [_noted(run, why) for _, run in members]
        else:
            found.append(_pooled(name, members))
    return found


def _apart(members: Sequence[Assembly]) -> str | None:
    """Why repeats can't be pooled; None where they can."""
    seeds = [seed for member in members for seed in member.seeds]
    if len(set(seeds)) < len(seeds):
        return f"sweeps with seeds {_seeds(members)} are not pooled, as they share some"
    if any(rule != SEARCHED for member in members for rule in member.experiment.rules):
        for split in members[0].experiment.splits:
            rates = [base[0] if (base := member.bases[split]) is not None else None for member in members]
            if len(set(rates)) > 1:
                said = " and ".join(n.number(rate) for rate in rates)
                return f"sweeps with seeds {_seeds(members)} are not pooled: rules start from rate {said} in them"
    return None


def _seeds(members: Sequence[Assembly]) -> str:
    ranges = [(m.seeds[0], m.seeds[-1]) for m in members]
    return " and ".join(f"{low} to {high}" if low != high else str(low) for low, high in ranges)


def _noted(run: Run, why: str) -> Run:
    assert run.convergence is not None
    steps = dataclasses.replace(run.convergence, notes=(*run.convergence.notes, Note("curves", why)))
    return dataclasses.replace(run, convergence=steps)


def _pooled(name: str, pairs: Sequence[tuple[Assembly, Run]]) -> Run:
    """One record of repeats, named so that it is known from theirs."""
    members = [member for member, _ in pairs]
    last = max((run for _, run in pairs), key=lambda run: run.created)
    own = [run.convergence for _, run in pairs if run.convergence is not None]
    seeds = tuple(seed for member in members for seed in member.seeds)
    noise = next((run.noise for run in sorted((r for _, r in pairs), key=_created)[::-1] if run.noise), None)
    told = Note("curves", f"seeds {_seeds(members)} of {len(members)} sweeps are pooled")
    notes = dict.fromkeys(note for steps in own for note in steps.notes)
    assert last.convergence is not None
    budgets = {(steps.gap_epochs, steps.gap_steps) for steps in own}
    alike = len(budgets) == 1
    rules = list(dict.fromkeys(rule for member in members for rule in member.experiment.rules))
    steps = dataclasses.replace(
        last.convergence,
        curves=tuple(_curve(members, rule, split, noise, seeds, alike) for rule in rules for split in _splits(members)),
        notes=(told, *notes),
        seeds=len(seeds),
        trials=sum(each.trials or 0 for each in own),
        complete=all(each.complete for each in own),
        gap_epochs=own[0].gap_epochs if alike else None,
        gap_steps=own[0].gap_steps if alike else None,
        experiment=name,
        pooled=tuple(each.experiment for each in own if each.experiment is not None),
        changed=max(each.changed or "" for each in own),
    )
    return dataclasses.replace(last, noise=noise, convergence=steps, complete=all(run.complete for _, run in pairs))


def _created(run: Run) -> str:
    return run.created


def _splits(members: Sequence[Assembly]) -> list[Split]:
    return members[0].experiment.splits


def _curve(
    members: Sequence[Assembly], rule: str, split: Split, noise: NoiseScale | None, seeds: Sequence[int], alike: bool
) -> Curve:
    """A rule's curve over the seeds of all."""
    stood: dict[int, list[Outcome]] = {}
    for member in members:
        for batch, outcomes in member.stood.get((rule, split), {}).items():
            stood.setdefault(batch, []).extend(outcomes)
    first = members[0].experiment
    points, caps, ran = [], {}, {}
    for batch, outcomes in sorted(stood.items()):
        found, caps[batch] = point_of(first.targets, rule, split, batch, seeds, outcomes)
        ran[batch] = steps_of(outcomes, seeds)
        budget = first.budget if alike and split == first.splits[0] else None
        points.append(found if budget is None else with_losses(found, outcomes, seeds, budget))
    notes = dict.fromkeys(note for member in members for note in member.unanswered.get((rule, split), ()))
    higher = any(outcome.trajectory.sign(split) < 0 for outcomes in stood.values() for outcome in outcomes)
    return curve(rule, split, first.targets[split], points, caps, noise, list(notes), higher=higher, ran=ran)
