"""The seed paper's four questions over several problems: what was found of each. Pure: records in, answers out.

A question holds where it holds on every problem measured, does not hold where one surely speaks against it, and is
undetermined otherwise. An interval that spans a factor of WIDE says nothing, whatever its ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pybatch.answer import claim, claims, factors, gap, interactions, rules
from pybatch.base import numerals as n
from pybatch.records import Capacity, ConvergencePoint, Curve, NoisePoint, Run, aim_of
from pybatch.scaling import SEARCHED

Finding = Literal["holds", "does not hold", "undetermined", "not measured"]
WIDE = 100.0  # high over low of a critical batch
_FOUND: dict[claim.Finding, Finding] = {"yes": "holds", "no": "does not hold"}
_COUNTER: dict[Finding, Finding] = {"holds": "does not hold", "does not hold": "holds"}


@dataclass(frozen=True)
class Row:
    """One line of a question's table, with what it says of the question; None: it is told beside."""

    cells: tuple[str, ...]
    finding: Finding | None


@dataclass(frozen=True)
class Answer:
    """A claim with its evidence and what was found of it."""

    claim: str
    heads: tuple[str, ...]
    rows: tuple[Row, ...]
    finding: Finding
    text: str
    below: tuple[str, ...] = ()  # what takes from the word of single rows
    against: tuple[str, ...] = ()  # what the paper would not have expected, beside rows that deny the claim


Records = Mapping[str, Run]  # by kind, of one problem


def levels_off(problems: Mapping[str, Records]) -> Answer:
    """RQ1: past some batch size a larger one saves no more steps, for train and for test loss."""
    rows, below = [], []
    for name, records in problems.items():
        for run, curve in tuned(records):
            found = _claims(run, None)
            stagnant, cost = found[f"{curve.split} steps level off"], found[f"{curve.split} cost rises"]
            finding = _finding(stagnant, stagnant.low, stagnant.high)
            cells = (name, trainer(run), goal(curve), critical(curve), _figure(stagnant), _figure(cost), finding)
            rows.append(Row(cells, finding))
            below += _less(f"{name}, {goal(curve)}", curve)
    heads = ("problem", "optimizer", "target", "critical batch", "levels off at", "examples a doubling, times", "")
    said = "past some batch size a larger one hardly saves steps, for train and for test loss"
    return replace(_answer(said, heads, rows), below=tuple(below))


def below_capacity(problems: Mapping[str, Records]) -> Answer:
    """RQ2: the critical batch lies below what the device can take: the batch that saturates it, or fills its memory."""
    rows = []
    for name, records in problems.items():
        capacity = capacity_of(records)
        for run, curve in tuned(records):
            found = _claims(run, capacity)[f"{curve.split} below capacity"]
            finding = _finding(found, found.low, found.high)
            if doubted(records) and finding != "not measured":
                finding = "undetermined"
            full = n.MISSING
            if capacity is not None:
                ends = n.interval(capacity.saturation_low, capacity.saturation_high)
                full = f"{n.number(capacity.saturation_batch)} {ends}{', disturbed' * doubted(records)}"
            cells = (name, trainer(run), goal(curve), critical(curve), full, fits(capacity), _figure(found), finding)
            rows.append(Row(cells, finding))
    heads = (
        "problem",
        "optimizer",
        "target",
        "critical batch",
        "saturation batch",
        "fits in memory",
        "critical over the less",
        "",
    )
    return _answer("the critical batch lies below what the device can take", heads, rows)


def rules_fail(problems: Mapping[str, Records]) -> Answer:
    """RQ3: rules that scale the rate with the batch help at first and then fail, each problem at another batch size."""
    rows, seeds, late = [], set(), []
    breaks: dict[tuple[str, str], dict[str, int]] = {}  # by rule and split, of each problem
    for name, records in problems.items():
        run, capacity = records.get("sweep"), capacity_of(records)
        steps = run.convergence if run is not None else None
        if run is None or steps is None:
            continue
        for curve in steps.curves:
            if curve.rule == SEARCHED:
                continue
            beside = [other for other in steps.curves if other.split == curve.split]
            held = rules.hold(curve, beside, steps.base_batch)
            helps = [c.finding for c in rules.beats_constant(curve, beside, steps.base_batch)]
            full = capacity.saturation_batch if capacity is not None else None
            share = n.share(held.broken / full) if held.broken and full else n.MISSING
            share += ", disturbed" * bool(held.broken and full and doubted(records))
            finding = None if curve.rule == rules.CONSTANT else _FOUND.get(held.finding, _open(held.finding))
            cells = (
                name,
                goal(curve),
                curve.rule,
                helps[0] if helps else n.MISSING,
                n.count(held.held),
                n.count(held.broken),
                share,
                finding or n.MISSING,
            )
            rows.append(Row(cells, finding))
            if finding == "holds" and held.broken and full and held.broken > full:
                late.append(f"{name}, {goal(curve)}: {curve.rule} fails where the device is full already, at {share}")
            if finding is not None and held.broken:
                breaks.setdefault((curve.rule, curve.split), {})[name] = held.broken
                seeds.add(max(p.seeds for p in curve.points))
    heads = ("problem", "target", "rule", "beats constant", "holds to", "fails at", "of the saturation batch", "")
    ran = ", ".join(dict.fromkeys(row.cells[2] for row in rows if row.finding is not None))
    found = _answer(f"rules that scale the rate ({ran or 'none was run'}) fail past some batch size", heads, rows)
    spans = []
    by_rule: dict[str, list[Finding]] = {}
    for row in rows:
        if row.finding not in (None, "not measured"):
            by_rule.setdefault(row.cells[2], []).append(row.finding)
    if len(by_rule) > 1:
        spans += [f"{rule}: {_counts(findings)}" for rule, findings in by_rule.items()]
    behind = f" ({' to '.join(str(e) for e in dict.fromkeys((min(seeds), max(seeds))))} seeds each)" if seeds else ""
    for (rule, split), at in breaks.items():
        ends = dict.fromkeys((n.count(min(at.values())), n.count(max(at.values()))))
        spans += [f"{rule} to the {split} target fails at {' to '.join(ends)}{behind}"] if len(at) > 1 else []
    return replace(found, text="; ".join([found.text, *spans]), against=tuple(late))


def size_matters_least(runs: Sequence[Run]) -> Answer:
    """RQ4: architecture and data complexity move the critical batch more than the size of the data set.

    Args:
        runs: tuned sweeps of a factorial experiment.
    """
    asked = "architecture and data complexity move the critical batch more than data size"
    heads = ("dial", "from", "to", "critical batch, times", "pair by pair", "")
    rows, against = [], []
    for effect in factors.effects(runs):
        ends = f"{n.number(effect.ratio)} {n.interval(effect.low, effect.high) or '(no interval)'}"
        clear = effect.determined and not (effect.low and effect.high and wide(effect.low, effect.high))
        kind = interactions.kind_of(effect.dial)
        told = "moves it, on average" if clear else "undetermined"
        pairs = ", ".join(n.number(ratio) for ratio in sorted(effect.ratios))
        rows.append(Row((f"{kind} ({effect.dial})", n.plain(effect.old), n.plain(effect.new), ends, pairs, told), None))
        if clear and kind == "data size":
            said = f"data size moves the critical batch, {ends} times on average, pair by pair {pairs}"
            against.append(f"{said}; the paper found it to move little")
    for both in interactions.interactions(runs):
        ends = f"{n.number(both.ratio)} {n.interval(both.low, both.high) or '(no interval)'}"
        told = "interact" if both.determined else "undetermined"
        rows.append(Row((" × ".join(both.dials), "", "", ends, n.counted(both.squares, "square"), told), None))
    orders = interactions.rankings(runs)
    if not orders:
        why = "fewer than two dials were turned in sweeps that have a critical batch"
        return Answer(asked, heads, tuple(rows), "not measured", why)
    findings = [_by_size(order) for order in orders]
    text = "; ".join(_order(order) for order in orders)
    turned = {ranked.kind for order in orders for ranked in order.dials}
    if missing := [kind for kind in ("architecture", "data complexity", "data size") if kind not in turned]:
        text += f"; {', '.join(missing)} not turned yet"
    if lost := factors.without_value(runs):
        text += f"; {n.counted(lost, 'sweep')} without a critical batch left out"
    return Answer(asked, heads, tuple(rows), overall(findings), text, against=tuple(against))


def generalizes_worse(problems: Mapping[str, Records]) -> Answer:
    """The counter-arm, Shallue et al. (2018): with rates tuned at each batch size larger ones generalize no worse.

    It holds where the gap surely does not grow; what it may grow by, at equal train loss, stands beside.
    """
    rows, below = [], []
    for name, records in problems.items():
        run = records.get("sweep")
        steps = run.convergence if run is not None else None
        if run is None or steps is None:
            continue
        for curve in steps.curves:
            if curve.split != "train":
                continue
            for found in gap.gap_claims(steps, curve):
                budget = found.name.partition("gap")[2].lstrip(", ") or "equal train loss"
                # Of tuned rates the counter-claim is tested: that the gap does not grow.
                finding = _FOUND.get(found.finding, _open(found.finding))
                counter = _COUNTER.get(finding, finding)
                arm = counter if curve.rule == SEARCHED else None
                word = {"holds": "grows", "does not hold": "does not grow"}.get(finding, finding)
                most = _at_most(found, curve) if budget == "equal train loss" else n.MISSING
                rows.append(Row((name, curve.rule, budget, _figure(found), most, word), arm))
                if word == "grows":
                    below.append(f"{name}, {curve.rule}, {budget}: {found.text}")
    heads = (
        "problem",
        "rates",
        "compared at",
        "gap, added a doubling",
        "over all batch sizes at most, of the test loss",
        "",
    )
    said = "with rates tuned at each batch size, larger batches do not generalize worse"
    return replace(_answer(said, heads, rows), below=tuple(below))


def _at_most(found: claim.Claim, curve: Curve) -> str:
    """The upper end of what is added from the smallest to the largest batch size that met the target, as a share of
    the test loss there; of fewer seeds than ran, of how many."""
    met = [p for p in curve.points if any(loss is not None for loss in p.other_losses)]
    losses = [loss for p in met for loss in p.other_losses if loss is not None]
    if found.high is None or len(met) < 2:
        return n.MISSING
    doublings, seeds = math.log2(met[-1].batch / met[0].batch), max(p.seeds for p in met)
    share = n.share(max(0.0, found.high) * doublings * len(losses) / sum(losses))
    return share + (f" ({found.seeds} of {seeds} seeds)" if found.seeds is not None and found.seeds < seeds else "")


def optimizers_differ(problems: Mapping[str, Records]) -> Answer:
    """The critical batch by optimizer; of Muon the claim that it is larger than AdamW's (2505.02222)."""
    rows, below = [], []
    for name, records in problems.items():
        curves = {trainer(run): curve for run, curve in tuned(records, every=True) if curve.split == "train"}
        first = curves.get("adamw")
        for optimizer, curve in curves.items():
            if first is None or optimizer == "adamw" or curve.target != first.target:
                continue
            ratio, low, high = ratio_of(curve, first)
            larger: Finding = "holds" if low and low > 1 else "does not hold" if high and high < 1 else "undetermined"
            finding = larger if ratio is not None else "not measured"
            cells = (name, goal(curve), optimizer, critical(curve), critical(first), within(ratio, low, high))
            rows.append(Row(cells, finding if optimizer == "muon" else None))
            below += _less(f"{name}, {optimizer}", curve)
    heads = ("problem", "target", "optimizer", "its critical batch", "that of adamw", "ratio")
    found = replace(_answer("Muon's critical batch is larger than AdamW's", heads, rows), below=tuple(below))
    return (
        found if found.finding != "not measured" else replace(found, text="no sweep with Muon; beside it stand others")
    )


def architectures(problems: Mapping[str, Records]) -> list[str]:
    """What a second network of the same domain and optimizer has for a critical batch, over the first."""
    found: list[str] = []
    first: dict[str, tuple[str, Curve]] = {}
    for name, records in problems.items():
        domain = name.partition("-")[0]
        for run, curve in tuned(records):
            key = f"{domain}, {trainer(run)}, {goal(curve)}"
            if key in first and first[key][0] != name:
                ratio, low, high = ratio_of(curve, first[key][1])
                found += [f"{name} over {first[key][0]}, {goal(curve)}: {within(ratio, low, high)}"] if ratio else []
            first.setdefault(key, (name, curve))
    return found


def noise_predicts(problems: Mapping[str, Records]) -> Answer:
    """Whether the critical batch that a noise scale gives agrees with a measured one: both with AdamW, train target."""
    rows = []
    for name, records in problems.items():
        bench, judge = records.get("bench"), records.get("judge")
        verdict, steps = (bench.verdict, judge.convergence) if bench is not None and judge is not None else (None, None)
        curve = next((c for c in steps.curves if c.split == "train"), None) if steps is not None else None
        if verdict is None or curve is None or not verdict.critical_batch or not curve.critical_batch:
            continue
        low, high = verdict.critical_low or 0.0, verdict.critical_high or math.inf
        least, most = curve.low or 0.0, curve.high or math.inf
        finding: Finding = "undetermined"
        if most < low or least > high:
            finding = "does not hold"
        elif low <= curve.critical_batch <= high and not wide(least, most) and not wide(low, high):
            finding = "holds"
        told = within(verdict.critical_batch, verdict.critical_low, verdict.critical_high)
        ratio = verdict.critical_batch / curve.critical_batch
        by_sweep = within(ratio, *(verdict.critical_batch / end if end else None for end in (curve.high, curve.low)))
        rows.append(Row((name, told, critical(curve), by_sweep, _branched(records), finding), finding))
    heads = ("problem", "by the noise scale", "by the sweep that judges", "their ratio", "by branches alone", "")
    return _answer(
        "the critical batch that the noise scale gives is the measured one, within the factor of 4 that it stands for",
        heads,
        rows,
    )


def _branched(records: Records) -> str:
    """The critical batch of `bench --thorough`'s branches, without what they stand for."""
    thorough = records.get("thorough")
    steps = thorough.convergence if thorough is not None else None
    if steps is None or not steps.branches or (fit := steps.branches[-1].fit) is None:
        return n.MISSING
    return within(fit.critical_batch, fit.low, fit.high)


def ratio_of(curve: Curve, base: Curve) -> tuple[float | None, float | None, float | None]:
    """Of two critical batches with its 95 % interval: errors of the logarithms added in quadrature."""
    if not curve.critical_batch or not base.critical_batch:
        return None, None, None
    ratio = curve.critical_batch / base.critical_batch
    down = _hypot(curve.critical_batch, curve.low, base.high, base.critical_batch)
    up = _hypot(curve.high, curve.critical_batch, base.critical_batch, base.low)
    return ratio, ratio / math.exp(down) if down is not None else None, ratio * math.exp(up) if up is not None else None


def _hypot(a: float | None, b: float | None, c: float | None, d: float | None) -> float | None:
    return math.hypot(math.log(a / b), math.log(c / d)) if a and b and c and d else None


def along(records: Records) -> list[tuple[NoisePoint, NoisePoint, int]]:
    """First and last noise scale with an interval, of each training along which it was read; and stretches left out."""
    found = []
    for kind, run in records.items():
        if kind.startswith("along") and run.trajectory is not None:
            resolved = [p for p in run.trajectory.points if p.status == "resolved"]
            found += [(resolved[0], resolved[-1], len(run.trajectory.points) - 2)] if len(resolved) > 1 else []
    return found


def tuned(records: Records, every: bool = False) -> list[tuple[Run, Curve]]:
    """Curves with rates tuned at each batch size, of the sweep of rules, or of `every` one that does not judge."""
    kinds = [kind for kind in records if every and kind in ("own", "sgd", "muon")]
    return [
        (run, curve)
        for kind in ("sweep", *kinds)
        if (run := records.get(kind)) is not None and run.convergence is not None
        for curve in run.convergence.curves
        if curve.rule == SEARCHED
    ]


def capacities(records: Records) -> list[Capacity]:
    """What the device does with the problem: by every run that found where it saturates, or else by one."""
    runs = [run for kind in ("bench", "thorough") if (run := records.get(kind)) is not None]
    found = [run.capacity for run in runs if run.capacity is not None]
    return [one for one in found if one.saturation_low is not None and one.saturation_high is not None] or found[:1]


def capacity_of(records: Records) -> Capacity | None:
    """Of `capacities` the first, its saturation batch within the intervals of all; the largest batch that one has run,
    where one has."""
    found = capacities(records)
    if not found:
        return None
    low = min((one.saturation_low for one in found if one.saturation_low is not None), default=None)
    high = max((one.saturation_high for one in found if one.saturation_high is not None), default=None)
    told = tuple(dict.fromkeys(text for one in found for text in one.disturbed))
    ran = max((one for one in found if one.max_batch_verified), key=lambda one: one.max_batch or 0, default=found[0])
    return replace(
        found[0],
        saturation_low=low,
        saturation_high=high,
        max_batch=ran.max_batch,
        max_batch_verified=ran.max_batch_verified,
        disturbed=told,
    )


def doubted(records: Records) -> bool:
    """Whether the device was saturated but once, and disturbed then: what another run would say is not known."""
    found = capacities(records)
    return len(found) == 1 and bool(found[0].disturbed)


def trainer(run: Run) -> str:
    steps = run.convergence
    return steps.optimizer or n.MISSING if steps is not None else n.MISSING


def goal(curve: Curve) -> str:
    return f"{aim_of(curve.split)} {n.number(curve.target)}"


def fits(capacity: Capacity | None) -> str:
    """The largest batch of which a step was run; else the one that its memory is predicted to hold."""
    if capacity is None or capacity.max_batch is None:
        return n.MISSING
    return n.number(capacity.max_batch) + ("" if capacity.max_batch_verified else ", predicted")


def within(value: float | None, low: float | None, high: float | None) -> str:
    """A figure and its interval."""
    return f"{n.number(value)} {n.interval(low, high)}".strip()


def _less(name: str, curve: Curve) -> list[str]:
    """What takes from the word of a curve: seeds that did not reach, and what its fit says of itself."""
    lost = [f"{p.reached} of {n.counted(p.seeds, 'seed')} reached at batch {n.count(p.batch)}" for p in _short(curve)]
    said = [note.text.partition(". ")[0] for note in curve.notes if note.figure in ("low", "critical_batch")]
    return [f"{name}: {'; '.join([*lost, *said])}."] if lost or said else []


def _short(curve: Curve) -> list[ConvergencePoint]:
    return [p for p in curve.points if (p.reached or 0) < p.seeds]


def critical(curve: Curve) -> str:
    """The critical batch of a curve with its interval, or what bounds it."""
    if curve.critical_batch is None:
        return n.interval(curve.low, curve.high) or n.MISSING
    return within(curve.critical_batch, curve.low, curve.high)


def wide(low: float, high: float) -> bool:
    """Whether an interval spans so much that it says nothing."""
    return low <= 0 or high / low >= WIDE


def overall(findings: Iterable[Finding | None]) -> Finding:
    """Of several problems together."""
    told = [finding for finding in findings if finding not in (None, "not measured")]
    if not told:
        return "not measured"
    if "does not hold" in told:
        return "does not hold"
    return "holds" if all(finding == "holds" for finding in told) else "undetermined"


def _answer(said: str, heads: tuple[str, ...], rows: Sequence[Row]) -> Answer:
    """What the rows say together, with the domains that they are of: the first word of a problem's name."""
    told = [row for row in rows if row.finding not in (None, "not measured")]
    findings = [row.finding for row in told]
    domains = dict.fromkeys(row.cells[0].partition("-")[0] for row in told)
    problems = n.counted(len({row.cells[0] for row in told}), "problem")
    cases = f"{n.counted(len(told), 'case')} of {problems} in {', '.join(domains)}"
    text = f"{cases}: {_counts(findings)}" if told else "nothing measured"
    return Answer(said, heads, tuple(rows), overall(findings), text)


def _counts(findings: Sequence[Finding | None]) -> str:
    return ", ".join(f"{finding} in {findings.count(finding)}" for finding in dict.fromkeys(findings))


def _claims(run: Run, capacity: Capacity | None) -> dict[str, claim.Claim]:
    return {found.name: found for found in claims.check_claims(replace(run, capacity=capacity))}


def _finding(found: claim.Claim, low: float | None, high: float | None) -> Finding:
    """Of a claim that stands on a figure with this interval."""
    if found.finding in _FOUND and low is not None and high is not None and wide(low, high):
        return "undetermined"
    return _FOUND.get(found.finding, _open(found.finding))


def _open(finding: claim.Finding) -> Finding:
    return "not measured" if finding == "not measured" else "undetermined"


def _figure(found: claim.Claim) -> str:
    if found.value is None:
        return n.interval(found.low, found.high) or n.MISSING
    lacking = f"({n.counted(found.seeds, 'seed')}, no interval)" if found.seeds is not None else "(no interval)"
    return f"{n.number(found.value)} {n.interval(found.low, found.high) or lacking}"


def _by_size(order: interactions.Ranking) -> Finding:
    """Whether data size surely moves the critical batch less than both others, or more than one of them."""
    kinds = {ranked.dial: ranked.kind for ranked in order.dials}
    above = {(kinds[more], kinds[less]) for more, less in order.above}
    others = ("architecture", "data complexity")
    if not {"data size", *others} <= set(kinds.values()):
        return "not measured"
    if any(("data size", other) in above for other in others):
        return "does not hold"
    return "holds" if all((other, "data size") in above for other in others) else "undetermined"


def _order(order: interactions.Ranking) -> str:
    sizes = [f"{r.kind} {n.number(r.size)} {n.interval(r.low, r.high)}" for r in order.dials]
    return f"to {order.split} loss {n.number(order.target)}, times up or down: " + ", ".join(sizes)
