"""Sweeps of one store that are one measurement: which of them says what of a batch size. No torch here.

Sweeps join where all that the trials and the searches depend on is the same (`SweepOptions.fixed`, the workload, the
kind of device): a later one adds batch sizes, rules, seeds, steps or a budget of epochs. Sweeps whose searches differ
(other rates, another search) are apart: on one curve, a batch size would owe its place to the larger search.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pybatch.records import NoiseScale
from pybatch.scaling import SEARCHED
from pybatch.sweep.budget import Budget
from pybatch.sweep.contents import NOISE, WHOLE, CellName, Contents, StoredSweep
from pybatch.training.trajectory import Split, ordered


@dataclass(frozen=True)
class Experiment:
    """Sweeps that are put together, in the order in which they were first begun, and the targets to report at."""

    sweeps: tuple[StoredSweep, ...]
    targets: Mapping[str, float]
    store: str
    name: str  # the same for every state of the same experiment in the same store

    @property
    def first(self) -> StoredSweep:
        """One of the sweeps, for what they have in common."""
        return self.sweeps[0]

    @property
    def rules(self) -> list[str]:
        """All that were asked for."""
        return list(dict.fromkeys(rule for sweep in self.sweeps for rule in sweep.options.rules))

    @property
    def batches(self) -> list[int]:
        """All that were asked for, ascending."""
        return sorted({batch for sweep in self.sweeps for batch in sweep.options.batches})

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those of the sweep with the most."""
        return max((sweep.options.seed_range for sweep in self.sweeps), key=len)

    @property
    def splits(self) -> list[Split]:
        """Those that have a target."""
        return ordered(self.targets)

    @property
    def noise(self) -> NoiseScale | None:
        """The gradient noise scale measured last."""
        known = [sweep for sweep in self.sweeps if sweep.noise is not None]
        return max(known, key=lambda sweep: sweep.measured or "").noise if known else None

    @property
    def noise_failed(self) -> bool:
        """Whether a sweep was to measure it, and none could."""
        return self.noise is None and any(NOISE in sweep.remarks for sweep in self.sweeps)

    @property
    def as_asked(self) -> bool:
        """Whether the targets are those that the sweeps were run for."""
        return all(self.targets == sweep.options.targets for sweep in self.sweeps)

    @property
    def epochs(self) -> list[float]:
        """Budgets asked for. The best one first: the largest of those that the most batch sizes were to spend."""
        asked = {s.options.gap_epochs for s in self.sweeps if s.options.gap_epochs is not None}
        return sorted(asked, key=lambda epochs: (-len(self.spending(epochs)), -epochs))

    @property
    def budget(self) -> Budget | None:
        """The best budget, over all batch sizes."""
        examples = self.first.subject.workload.examples
        if not self.epochs or examples is None:
            return None
        return Budget.of(self.epochs[0], examples, self.batches)

    def spending(self, epochs: float) -> list[int]:
        """Batch sizes whose runs were to go so far: a longer run has the losses of a shorter budget too."""
        return sorted({batch for sweep in self._spending(epochs) for batch in sweep.options.batches})

    def seeking(self, batch: int) -> StoredSweep | None:
        """The sweep whose search speaks for a batch size: that with the most seeds, of these the last one begun."""
        own = [sweep for sweep in self.sweeps if _seeks(sweep, batch)]
        return max(own, key=lambda sweep: (sweep.options.seeds, sweep.begun), default=None)

    def sought(self, batch: int) -> frozenset[str]:
        """Keys of a search's own trials; of all searches at the batch size where the one that speaks is not over."""
        last = self.seeking(batch)
        if last is not None and (SEARCHED, WHOLE, batch) in last.ended:
            return last.sought.get(batch, frozenset())
        return frozenset().union(*(sweep.sought.get(batch, ()) for sweep in self.sweeps))

    def following(self, rule: str, batch: int) -> StoredSweep | None:
        """The sweep that was last to run a rule at a batch size with all the seeds."""
        own = [s for s in self.sweeps if rule in s.options.rules and batch in s.options.batches]
        return max((s for s in own if s.options.seeds == len(self.seeds)), key=_begun, default=None)

    def cells(self, rule: str, batch: int, split: Split) -> tuple[StoredSweep | None, list[CellName]]:
        """The sweep that says whether a rule's trials at a batch size are over, and the cells in which it says so."""
        if rule == SEARCHED:
            return self.seeking(batch), [(rule, WHOLE, batch)]
        last = self.following(rule, batch)
        if last is None:
            return None, []
        asked = last.options.targets  # a target of another split is read from the same trials
        return last, [(rule, each, batch) for each in ([split] if split in asked else asked)]

    def spender(self, rule: str, batch: int) -> StoredSweep | None:
        """The sweep that was last to go on to the budget with a rule's runs at a batch size."""
        if self.budget is None or not self.as_asked:  # other targets may choose other runs
            return None
        own = self._spending(self.budget.epochs)
        asked = [s for s in own if rule in s.options.rules and batch in s.options.batches]
        return max(asked, key=_begun, default=None)

    def _spending(self, epochs: float) -> list[StoredSweep]:
        return [s for s in self.sweeps if s.options.gap_epochs is not None and s.options.gap_epochs >= epochs]


def experiments(contents: Contents, targets: Mapping[str, float] | None = None) -> list[Experiment]:
    """The sweeps of a store, put together.

    Args:
        contents: of the store.
        targets: losses to report at, by split; None: those that each sweep was run for.
    """
    found: dict[str, list[StoredSweep]] = {}
    for sweep in contents.sweeps:
        own = sweep.options.fixed if targets is None else sweep.options.fixed | {"target": dict(targets)}
        identity = [contents.name, sweep.subject.fingerprint, sweep.subject.device.kind, own]
        found.setdefault(json.dumps(identity, sort_keys=True), []).append(sweep)
    return [
        Experiment(
            tuple(sweeps),
            sweeps[0].options.targets if targets is None else dict(targets),
            contents.name,
            _named(identity),
        )
        for identity, sweeps in found.items()
    ]


def pool_name(experiment: Experiment) -> str:
    """The same for experiments that differ in their seeds alone."""
    subject, fixed = experiment.first.subject, experiment.first.options.fixed
    identity = [
        "pooled",
        experiment.store,
        subject.fingerprint,
        subject.device.kind,
        fixed | {"seed": None, "target": dict(experiment.targets)},
    ]
    return _named(json.dumps(identity, sort_keys=True))


def changed(sweeps: Iterable[StoredSweep], stored: Iterable[str]) -> str:
    """When the store last learned something: a trial (`stored`), a cell's end, a new sweep, its noise scale."""
    marks = [mark for s in sweeps for mark in (s.created, s.measured or "", *s.ended.values())]
    return max([*marks, *stored])


def _named(identity: str) -> str:
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _begun(sweep: StoredSweep) -> str:
    return sweep.begun


def _seeks(sweep: StoredSweep, batch: int) -> bool:
    options = sweep.options
    if batch == options.start_batch:
        return options.seeks or options.base_rate is None
    return options.seeks and batch in options.batches
