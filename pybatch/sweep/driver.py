"""A sweep on its way: which trials are run next."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch

from pybatch.base.errors import UsageError, WorkloadError
from pybatch.base.numerals import counted
from pybatch.processes.workers import LostWorkerError, Ticket, Workers
from pybatch.records import Convergence, NoiseScale, Note
from pybatch.scaling import SEARCHED, Base, Scaled, scale
from pybatch.sweep import live
from pybatch.sweep.budget import NEVER, Budget
from pybatch.sweep.contest import Contest
from pybatch.sweep.live import Live
from pybatch.sweep.plan import Plan
from pybatch.sweep.search import Heat, best_rate
from pybatch.sweep.store import BEGUN, Store
from pybatch.sweep.summary import bare_reason
from pybatch.sweep.sweep_record import record
from pybatch.training.trial import FACTOR, Outcome, Race, Trial, Unit
from pybatch.workloads.base import Workload

GIVEN = "given"  # in place of a rule: the base batch at the rate that was given
POLL = 0.5  # s between looks at trials that another process runs

Found = Callable[[str], None]  # a heading, then a row for each batch size and rule as it is known


class Sweep:
    """One sweep on its way: contests, the store, the workers."""

    def __init__(
        self,
        plan: Plan,
        store: Store,
        workers: Workers,
        identity: str,
        device: torch.device,
        found: Found | None,
        live: Live,
    ) -> None:
        self.plan, self.store, self.workers = plan, store, workers
        self.identity, self.device, self.found, self.live = identity, device, found, live
        self.key = ""  # of this sweep in the store
        self.contests: list[Contest] = []
        self.further: list[Contest] = []  # their runs past the targets
        self.ended = False  # nothing is left to run
        self.notes: dict[str, str] = {}  # why trials were not stacked: each cause, and the first that had it

    def begin(self, key: str) -> None:
        """Note in the store that the sweep of this key has begun."""
        self.key = key
        self.store.mark(key, [BEGUN])

    def run(self) -> None:
        """Run the base batch, then everything else, as many at a time as there are workers."""
        plan = self.plan
        fixed = [rule for rule in plan.rules if rule != SEARCHED]
        given = self._given(plan.base_rate) if plan.base_rate is not None else None
        tuned = self._search(plan.base_batch, plan.max_steps) if given is None or SEARCHED in plan.rules else None
        sought = len(plan.batches) - (plan.base_batch in plan.batches) if SEARCHED in plan.rules else 0
        self.live.rows = len(self.contests) + sought + len(fixed) * len(plan.targets) * len(plan.batches)
        self._finish(self.contests)
        contests = self._tune(tuned) if tuned is not None and sought else []
        if (start := given or tuned) is not None:
            contests += [
                self._fixed(start, rule, split, b) for rule in fixed for split in plan.targets for b in plan.batches
            ]
        self._finish(contests)
        if plan.budget is not None:
            self.further = [go_on for contest in self.contests if (go_on := self._further(contest, plan.budget))]
            self.live.rows += len(self.further)
            self._finish(self.further)
        self.ended = True

    def _tune(self, base: Contest) -> list[Contest]:
        """The searches at all other batch sizes, but for those that cannot be expected to reach a target."""
        # Large batches first: they take longest, and the last to end should be short.
        sought = [b for b in reversed(self.plan.batches) if b != base.batch]
        if len(sought) > 1 and not self._reached(base) and sought[0] > base.batch:
            largest = self._search(sought.pop(0), self.plan.max_steps)
            self._finish([largest])
            if not largest.failed and not self._reached(largest):
                self._leave_out(sought, base, largest)
                return []
        return [self._search(b, self._cap(base, b)) for b in sought]

    def _reached(self, contest: Contest) -> bool:
        return any(p.steps is not None for p in contest.points(self.plan.seeds).values())

    def _leave_out(self, batches: Sequence[int], base: Contest, largest: Contest) -> None:
        """Tuned steps fall with the batch and then stay: what neither end reaches, none between is expected to."""
        steps = self.plan.max_steps
        text = f"not run: neither batch {base.batch} nor {largest.batch} reached a target in {counted(steps, 'step')}"
        for batch in batches:
            self._fail(self._search(batch, steps), text)

    def _search(self, batch: int, cap: int) -> Contest:
        contest = Contest(SEARCHED, batch, self.plan.targets, cap, self.plan.searcher())
        self.contests.append(contest)
        return contest

    def _given(self, lr: float) -> Contest:
        """Runs at the base batch with the rate that was given: their steps are what rules and caps go by."""
        plan = self.plan
        contest = Contest(GIVEN, plan.base_batch, plan.targets, plan.max_steps, None)
        self.contests.append(contest)
        trials = [self._trial(Scaled(plan.group | {"lr": lr}), plan.base_batch, seed) for seed in plan.seeds]
        self._begin(contest, trials, plan.seeds)
        return contest

    def _fixed(self, start: Contest, rule: str, split: str, batch: int) -> Contest:
        """A rule's trials at one batch size, from the base batch's rate: given, or tuned for this split's target."""
        plan = self.plan
        contest = Contest(rule, batch, {split: plan.targets[split]}, self._cap(start, batch, split), None)
        self.contests.append(contest)
        lr, steps = self._base(start, split)
        if lr is None:
            return self._fail(contest, f"no rate reached the target at the base batch {plan.base_batch}")
        try:
            scaled = scale(rule, plan.group | {"lr": lr}, batch, Base(plan.base_batch, steps))
        except UsageError as error:
            return self._fail(contest, bare_reason(batch, error))
        self._begin(contest, [self._trial(scaled, batch, seed) for seed in plan.seeds], plan.seeds)
        return contest

    def _further(self, contest: Contest, budget: Budget) -> Contest | None:
        """The runs of one point of the first target, to the end of the budget; None where there is no such point."""
        split = self.plan.compared
        if contest.failed or split not in contest.targets or contest.rule not in self.plan.rules:
            return None
        if contest.batch not in self.plan.batches:  # a base batch beside them has no point, and no say in the budget
            return None
        lr = contest.points(self.plan.seeds)[split].learning_rate
        if lr is None:
            return None
        trials = [trial for trial in contest.trials.values() if trial.lr == lr]
        going = Contest(contest.rule, contest.batch, {split: NEVER}, budget.steps_at(contest.batch), None)
        going.continues = contest
        self._begin(going, trials, self.plan.seeds)
        return going

    @staticmethod
    def _begin(contest: Contest, trials: list[Trial], seeds: tuple[int, ...]) -> None:
        contest.heat, contest.seeds = trials, seeds
        contest.trials |= {trial.key: trial for trial in trials}

    def _base(self, base: Contest, split: str) -> tuple[float | None, float | None]:
        """The base batch's rate for a split's target, given or tuned, and its median steps; None where none reached."""
        race = base.race(self.plan.seeds, base.outcomes)
        best = best_rate(race, split, sorted({trial.lr for trial in base.trials.values()}))
        return best or (self.plan.base_rate if base.rule == GIVEN else None), race.median(split, best) if best else None

    def _cap(self, base: Contest, batch: int, split: str | None = None) -> int:
        """FACTOR times the steps that the base batch took, and more below it, where fewer examples are seen a step."""
        plan, most = self.plan, 0.0
        for each in plan.targets if split is None else (split,):
            steps = self._base(base, each)[1]
            if steps is None:
                return plan.max_steps
            most = max(most, FACTOR * steps * max(1.0, plan.base_batch / batch))
        return min(plan.max_steps, max(1, round(most)))

    def _trial(self, scaled: Scaled, batch: int, seed: int) -> Trial:
        plan = self.plan
        return Trial(self.identity, plan.optimizer, scaled, batch, seed, plan.dtype, self.device.type)

    def _finish(self, contests: Sequence[Contest]) -> None:
        """Run contests to their ends."""
        waiting = [contest for contest in contests if not contest.over]
        active: list[tuple[Ticket, Contest]] = []
        while waiting or active:
            for contest in list(waiting):
                if len(active) >= self.workers.width:
                    break
                unit = self._next_unit(contest)
                if unit is not None:
                    active.append((self.workers.submit(unit), contest))
                if unit is not None or contest.over:
                    waiting.remove(contest)
            if not active:
                if waiting:
                    time.sleep(POLL)  # all that is missing is being run by another process
                continue
            try:
                done = self.workers.wait()
            except LostWorkerError as error:
                done = self._lost(active, error)
            [entry] = [entry for entry in active if entry[0] is done]
            active.remove(entry)
            contest = entry[1]
            self.store.release(contest.claimed)
            if done.note:
                self.notes.setdefault(done.note.partition(" (")[0], done.note)  # figures follow in brackets
            if done.error is not None:
                if not any(c.outcomes for c in self.contests):  # it works at no batch size
                    raise WorkloadError(done.error)
                self._fail(contest, done.error)
            elif done.failed:
                self._fail(contest, done.failed)
            else:
                waiting.insert(0, contest)  # to its end before others begin

    @staticmethod
    def _lost(active: list[tuple[Ticket, Contest]], error: LostWorkerError) -> Ticket:
        ticket = next(ticket for ticket, _ in active if ticket is error.ticket)
        ticket.failed = str(error)
        return ticket

    def _next_unit(self, contest: Contest) -> Unit | None:
        """The trials to run next; None where the contest is over, or another process runs all that is missing."""
        plan = self.plan
        while True:
            stored = self.store.outcomes(contest.trials.values())
            race = contest.race(contest.seeds, list(stored.values()))
            missing = [t for t in contest.heat if not _answered(t, stored, race)]
            if missing:
                granted = self.store.claim(t.key for t in missing)
                again = self.store.outcomes(t for t in missing if t.key in granted)  # ended before it was claimed
                fresh = [t for t in missing if t.key in granted and not _answered(t, again, race)]
                self.store.release(granted - {t.key for t in fresh})
                if not fresh:
                    if len(granted) == len(missing):
                        continue
                    return None
                contest.claimed = [t.key for t in fresh]
                known = tuple(stored.values())
                return Unit(
                    tuple(fresh), dict(contest.targets), contest.seeds, contest.cap, contest.search is not None, known
                )
            heat = self._next_heat(contest, list(stored.values()))
            if heat is None:
                contest.outcomes, contest.over = list(stored.values()), True
                if contest.continues is not None:
                    self._lengthen(contest)
                    return None
                self.store.mark(self.key, [(contest.rule, split, contest.batch) for split in contest.targets])
                self._say(contest)
                return None
            trials = [self._trial(Scaled(plan.group | {"lr": lr}), contest.batch, seed) for lr, seed in heat.cells]
            self._begin(contest, trials, heat.seeds)

    def _next_heat(self, contest: Contest, outcomes: Sequence[Outcome]) -> Heat | None:
        return contest.search.heat(contest.race(self.plan.seeds, outcomes)) if contest.search is not None else None

    def _lengthen(self, further: Contest) -> None:
        """Put longer runs in the places of those they began with, whichever contests these are in."""
        longer = {outcome.trial.key: outcome for outcome in further.outcomes}
        for contest in self.contests:
            contest.outcomes = [longer.get(outcome.trial.key, outcome) for outcome in contest.outcomes]
        self.live.over += 1

    def _fail(self, contest: Contest, reason: str) -> Contest:
        contest.over, contest.failed = True, reason
        self._say(contest)
        return contest

    def _say(self, contest: Contest) -> None:
        self.live.over += 1
        if self.found is None:
            return
        if self.live.over == 1:
            self.found(live.head(self.plan.targets))
        if contest.failed:
            self.found(live.failed(contest.batch, contest.rule, contest.failed))
            return
        points = contest.points(self.plan.seeds)
        self.found(live.row(contest.batch, contest.rule, [points.get(split) for split in self.plan.targets]))
        for split, found in points.items():
            near = live.nearest(split, contest.outcomes) if found.steps is None else None
            if near is not None:
                self.found(f"{'':16}  {near}")

    def result(self, workload: Workload, noise: NoiseScale | None, notes: tuple[Note, ...] = ()) -> Convergence:
        """The record of all contests that are over."""
        return record(
            workload,
            self.plan,
            self.device,
            self.contests,
            further=self.further,
            ended=self.ended,
            remarks=self.notes.values(),
            noise=noise,
            notes=notes,
        )


def _answered(trial: Trial, stored: Mapping[str, Outcome], race: Race) -> bool:
    return trial.key in stored and stored[trial.key].answers(race.targets, race.limits())
