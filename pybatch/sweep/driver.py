"""A sweep on its way: which trials are run next."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from pybatch.base.errors import StoreError, UsageError, WorkloadError
from pybatch.base.numerals import counted
from pybatch.processes.workers import Ending, LostWorkerError, Submission, Workers
from pybatch.records import Run
from pybatch.scaling import SEARCHED, Base, Scaled, scale
from pybatch.sweep.budget import NEVER, Budget
from pybatch.sweep.cell import Cell
from pybatch.sweep.contents import GIVEN, LONGER, WHOLE, CellName, Subject
from pybatch.sweep.options import SweepOptions
from pybatch.sweep.progress import SweepProgress, failed_row, heading, row
from pybatch.sweep.record import base_of, record_of, ruled_trials, trial_of
from pybatch.sweep.store import Store
from pybatch.sweep.summary import bare_reason, nearest
from pybatch.training.trajectory import metric_of
from pybatch.training.trial import FACTOR, Outcome, Task, Trial

POLL = 0.5  # s between looks at trials that another process runs

Found = Callable[[str], None]  # a heading, then a row for each batch size and rule as it is known


class Sweep:
    """One sweep on its way: its cells, the store, the workers.

    Args:
        options: settled.
        subject: what is trained, and where.
        store: what is run is put there, and the record is read from it.
        number: of the sweep in the store.
        workers: where trials run.
        found: called with a heading, then with a row for each cell as it is known.
        progress: of the whole.
    """

    def __init__(
        self,
        options: SweepOptions,
        subject: Subject,
        store: Store,
        number: int,
        workers: Workers,
        found: Found | None,
        progress: SweepProgress,
    ) -> None:
        self.options, self.subject, self.workers, self.found, self.progress = options, subject, workers, found, progress
        self.store, self.number = store, number
        self.seeds = options.seed_range
        self.cells: list[Cell] = []
        self.failures: dict[CellName, str] = {}  # why, of cells whose trials could not all run

    def run(self) -> None:
        """Run the base batch, then everything else, as many at a time as there are workers."""
        options = self.options
        fixed = [rule for rule in options.rules if rule != SEARCHED]
        given = self._given(options.base_rate) if options.base_rate is not None else None
        tuned = self._search(options.start_batch, options.max_steps) if given is None or options.seeks else None
        sought = len(set(options.batches) - {options.start_batch}) if options.seeks else 0
        self.progress.rows = len(self.cells) + sought + len(fixed) * len(options.targets) * len(options.batches)
        self._finish(self.cells)
        self._finish(self._tune(tuned) if tuned is not None and sought else [])
        if (start := given or tuned) is not None:  # last: a rule is given up by the tuned steps
            self._finish(
                [
                    self._fixed(start, rule, split, b)
                    for rule in fixed
                    for split in options.targets
                    for b in options.batches
                ]
            )
        examples = self.subject.workload.examples
        if options.gap_epochs is not None and examples is not None:
            budget = Budget.of(options.gap_epochs, examples, options.batches)
            longer = [on for cell in list(self.cells) if (on := self._longer(cell, budget)) is not None]
            self.progress.rows += len(longer)
            self._finish(longer)

    @property
    def measured(self) -> bool:
        """Whether a trial of this sweep has run to its end, here or before: there is something to keep."""
        return any(cell.outcomes or self.store.outcomes(cell.trials.values()) for cell in self.cells)

    def record(self) -> Run:
        """What the store says of the experiment that this sweep belongs to; where it is lost, what this sweep knows."""
        try:
            return record_of(self.store.contents(), self.number)
        except StoreError as error:
            return self._remembered(str(error))

    def _remembered(self, why: str) -> Run:
        """The record of the cells that are over here, by way of a store in memory."""
        with Store(None, self.store.environment) as memory:
            number = memory.begin(self.subject, self.options, None)
            memory.remark(number, "store", why)
            for cell in self.cells:
                if cell.name in self.failures:
                    memory.end(number, [cell.name], self.failures[cell.name])
                elif cell.over and not cell.failed:
                    for outcome in cell.outcomes:
                        memory.put(outcome)
                    if cell.search is not None:
                        memory.seek(number, cell.batch, cell.trials.values())
                    memory.end(number, [cell.name])
            run = record_of(memory.contents(), number)
        assert run.convergence is not None
        return replace(run, complete=False, convergence=replace(run.convergence, complete=False))

    def _tune(self, base: Cell) -> list[Cell]:
        """The searches at all other batch sizes, but for those that cannot be expected to reach a target."""
        # Large batches first: they take longest, and the last to end should be short.
        sought = [b for b in reversed(self.options.batches) if b != base.batch]
        if len(sought) > 1 and not self._reached(base) and sought[0] > base.batch:
            largest = self._search(sought.pop(0), self.options.max_steps)
            self._finish([largest])
            if not largest.failed and not self._reached(largest):
                self._leave_out(sought, base, largest)
                return []
        return [self._search(b, self._cap(base, b), self._expected(base, b)) for b in sought]

    def _reached(self, cell: Cell) -> bool:
        return any(p.steps is not None for p in cell.points(self.seeds).values())

    def _leave_out(self, batches: Sequence[int], base: Cell, largest: Cell) -> None:
        """Tuned steps fall with the batch and then stay: what neither end reaches, none between is expected to."""
        steps = self.options.max_steps
        text = f"not run: neither batch {base.batch} nor {largest.batch} reached a target in {counted(steps, 'step')}"
        for batch in batches:
            self._fail(self._search(batch, steps), text)

    def _expected(self, base: Cell, batch: int) -> float | None:
        """The rate that is expected to do well at a batch size, from the base batch's best by the square root rule.

        From that one alone, not from a neighbour: which of them are done depends on the workers.
        """
        best = self._base(base, self.options.compared)
        if best is None:
            return None
        return float(scale("sqrt", {"lr": best[0]}, batch, Base(base.batch)).group["lr"])

    def _search(self, batch: int, cap: int, near: float | None = None) -> Cell:
        cell = Cell((SEARCHED, WHOLE, batch), self.options.targets, cap, self.options.searcher(near))
        self.cells.append(cell)
        return cell

    def _given(self, lr: float) -> Cell:
        """Runs at the base batch with the rate that was given: their steps are what rules and caps go by."""
        batch = self.options.start_batch
        cell = Cell((GIVEN, WHOLE, batch), self.options.targets, self.options.max_steps)
        self.cells.append(cell)
        cell.begin((self._trial(lr, batch, seed) for seed in self.seeds), self.seeds)
        return cell

    def _fixed(self, start: Cell, rule: str, split: str, batch: int) -> Cell:
        """A rule's trials at one batch size, from the base batch's rate: given, or tuned for this split's target."""
        options, subject = self.options, self.subject
        cell = Cell((rule, split, batch), {split: options.targets[split]}, self._cap_of_rule(start, batch, split))
        self.cells.append(cell)
        base = self._base(start, split)
        if base is None:
            return self._leave(cell, f"no rate reached the target at the base batch {options.start_batch}")
        try:
            trials = ruled_trials(options, subject.fingerprint, subject.device.kind, rule, batch, base, self.seeds)
        except UsageError as error:
            return self._leave(cell, bare_reason(batch, error))
        cell.begin(trials, self.seeds)
        return cell

    def _longer(self, cell: Cell, budget: Budget) -> Cell | None:
        """The runs of one point of the first target, to the end of the budget; None where there is no such point."""
        split = self.options.compared
        if cell.failed or split not in cell.targets or cell.rule not in self.options.rules:
            return None
        if cell.batch not in self.options.batches:  # a base batch beside them has no point, and no say in the budget
            return None
        lr = cell.points(self.seeds)[split].learning_rate
        if lr is None:
            return None
        longer = Cell((cell.rule, LONGER, cell.batch), {split: NEVER}, budget.steps_at(cell.batch))
        longer.begin((trial for trial in cell.trials.values() if trial.lr == lr), self.seeds)
        return longer

    def _base(self, start: Cell, split: str) -> tuple[float, float | None] | None:
        study = start.study(self.seeds, start.outcomes)
        return base_of(study, split, self.options.base_rate if start.rule == GIVEN else None)

    def _cap(self, start: Cell, batch: int, split: str | None = None) -> int:
        """FACTOR times the steps that the base batch took, and more below it, where fewer examples are seen a step."""
        options, most = self.options, 0.0
        for each in options.targets if split is None else (split,):
            base = self._base(start, each)
            if base is None or base[1] is None:
                return options.max_steps
            most = max(most, FACTOR * base[1] * max(1.0, options.start_batch / batch))
        return min(options.max_steps, max(1, round(most)))

    def _cap_of_rule(self, start: Cell, batch: int, split: str) -> int:
        """FACTOR times the tuned steps at the same batch size too, where they are known."""
        cap = self._cap(start, batch, split)
        tuned = next((c for c in self.cells if c.rule == SEARCHED and c.batch == batch and not c.failed), None)
        best = self._base(tuned, split) if tuned is not None else None
        return cap if best is None or best[1] is None else min(cap, max(1, round(FACTOR * best[1])))

    def _trial(self, lr: float, batch: int, seed: int) -> Trial:
        subject, scaled = self.subject, Scaled({**self.options.options, "lr": lr})
        return trial_of(self.options, subject.fingerprint, subject.device.kind, scaled, batch, seed)

    def _finish(self, cells: Sequence[Cell]) -> None:
        """Run cells to their ends."""
        waiting = [cell for cell in cells if not cell.over]
        active: list[tuple[Submission, Cell]] = []
        while waiting or active:
            for cell in list(waiting):
                if len(active) >= self.workers.width:
                    break
                task = self._next_task(cell)
                if task is not None:
                    active.append((self.workers.submit(task), cell))
                if task is not None or cell.over:
                    waiting.remove(cell)
            if not active:
                if waiting:
                    time.sleep(POLL)  # all that is missing is being run by another process
                continue
            try:
                submission = self.workers.wait()
                ending = submission.ending or Ending()
            except LostWorkerError as error:
                submission, ending = error.submission, Ending(failed=str(error))
            [entry] = [entry for entry in active if entry[0] is submission]
            active.remove(entry)
            cell = entry[1]
            self.store.release(cell.claimed)
            if ending.note:
                cause = ending.note.partition(" (")[0]  # figures follow in brackets
                self.store.remark(self.number, cause, ending.note)
            if ending.error is not None:
                if not (self.measured or ending.begun):  # it works at no batch size
                    raise WorkloadError(ending.error)
                self._fail(cell, ending.error)
            elif ending.failed:
                self._fail(cell, ending.failed)
            else:
                waiting.insert(0, cell)  # to its end before others begin

    def _next_task(self, cell: Cell) -> Task | None:
        """The trials to run next; None where the cell is over, or another process runs all that is missing."""
        while True:
            stored = self.store.outcomes(cell.trials.values())
            if missing := cell.missing(stored):
                granted = self.store.claim(t.key for t in missing)
                again = self.store.outcomes(t for t in missing if t.key in granted)  # ended before it was claimed
                left = {t.key for t in cell.missing(stored | again)}
                fresh = [t for t in missing if t.key in granted & left]
                self.store.release(granted - left)
                if not fresh:
                    if len(granted) == len(missing):
                        continue
                    return None
                cell.claimed = [t.key for t in fresh]
                known = tuple(stored.values())
                metrics = any(map(metric_of, self.options.targets))
                search = cell.search is not None
                return Task(tuple(fresh), dict(cell.targets), cell.seeds, cell.cap, search, cell.margin, known, metrics)
            outcomes = list(stored.values())
            study = cell.study(self.seeds, outcomes)
            proposal = cell.search.propose(study) if cell.search is not None else None
            if proposal is None:
                self._end(cell, outcomes)
                return None
            runs = (self._trial(lr, cell.batch, seed) for lr, seed in proposal.runs)
            cell.begin(runs, proposal.seeds, proposal.margin)
            self.store.seek(self.number, cell.batch, cell.now)

    def _end(self, cell: Cell, outcomes: list[Outcome]) -> None:
        cell.outcomes, cell.over = outcomes, True
        self.store.end(self.number, [cell.name])
        if cell.name[1] == LONGER:
            self.progress.over += 1
        else:
            self._say(cell)

    def _fail(self, cell: Cell, reason: str) -> Cell:
        """End a cell whose trials could not all run, and keep why."""
        self.failures[cell.name] = reason
        self.store.end(self.number, [cell.name], reason)
        return self._leave(cell, reason)

    def _leave(self, cell: Cell, reason: str) -> Cell:
        """End a cell for which its rule has no trials, as whoever reads the store will find too."""
        cell.over, cell.failed = True, reason
        self._say(cell)
        return cell

    def _say(self, cell: Cell) -> None:
        self.progress.over += 1
        if self.found is None:
            return
        if self.progress.over == 1:
            self.found(heading(self.options.targets))
        if cell.failed:
            self.found(failed_row(cell.batch, cell.rule, cell.failed))
            return
        points = cell.points(self.seeds)
        self.found(row(cell.batch, cell.rule, [points.get(split) for split in self.options.targets]))
        for split, found in points.items():
            near = nearest(split, cell.outcomes) if found.steps is None else None
            if near is not None:
                self.found(f"{'':16}  {near}")
