"""What several sweeps say together, as sections of the report: what moves the critical batch, and where rules fail."""

from __future__ import annotations

from collections.abc import Sequence

from pybatch.answer.factors import Effect, effects, without_value
from pybatch.answer.interactions import Interaction, Ranking, interactions, rankings
from pybatch.answer.rules import Hold, breaks
from pybatch.base import numerals as n
from pybatch.records import Run, aim_of
from pybatch.report.layout import Section, Table

TITLE = "What moves the critical batch"
RULES = "How far rules hold, problem by problem"


def sections(runs: Sequence[Run]) -> list[Section]:
    """A table of rules where there are two problems; effects of dials, their interactions and their order."""
    return [*_rules(runs), *_factors(runs)]


def _rules(runs: Sequence[Run]) -> list[Section]:
    found = breaks(runs)
    if not found:
        return []
    rules = list(dict.fromkeys(b.hold.rule for b in found))
    problems = list(dict.fromkeys(b.problem for b in found))
    cells = {(b.problem, b.hold.rule): _held(b.hold) for b in found}
    rows = tuple((problem, *(cells.get((problem, rule), n.MISSING) for rule in rules)) for problem in problems)
    note = (
        "fails: over twice the tuned steps by the whole 95 % interval, or fewer runs reach than with tuned rates; each "
        "problem's own claims have the figures"
    )
    return [Section(RULES, Table(("problem", *rules), rows), details=(note,))]


def _held(hold: Hold) -> str:
    if hold.finding == "not measured":
        return n.MISSING
    if hold.broken is not None:
        ratio = f" ({hold.ratio.words()} times)" if hold.ratio is not None else " (not reached)"
        return f"fails at {n.count(hold.broken)}{ratio}"
    if hold.held is None:
        return "undetermined"
    return f"holds to {n.count(hold.held)}" + ("" if hold.finding == "no" else ", undetermined past it")


def _factors(runs: Sequence[Run]) -> list[Section]:
    found = effects(runs)
    if not found:
        return []
    lines = [(f"{e.dial} {_level(e.old)} to {_level(e.new)}", _text(e)) for e in found]
    lines += [(" × ".join(i.dials), _interaction(i)) for i in interactions(runs)]
    lines += [("in order", _ranking(r)) for r in rankings(runs)]
    details = ["each is the ratio of critical batches of sweeps that differ in this dial alone, both with tuned rates"]
    if lost := without_value(runs):
        text = f"{n.counted(lost, 'sweep has', 'sweeps have')} no critical batch, or a bound of it alone"
        details.append(f"{text}, and {'is' if lost == 1 else 'are'} left out")
    return [Section(TITLE, lines=tuple(lines), details=tuple(details))]


def _text(e: Effect) -> str:
    pairs = f", mean of {e.pairs} pairs" if e.pairs > 1 else ""
    doubt = "" if e.determined else "; undetermined"
    ratio = f"{n.number(e.ratio)} {n.interval(e.low, e.high) or '(no interval)'}"
    return f"{ratio} times, {aim_of(e.split)} {n.number(e.target)}{pairs}{doubt}"


def _interaction(i: Interaction) -> str:
    (a, b), ratio = i.dials, f"{n.number(i.ratio)} {n.interval(i.low, i.high) or '(no interval)'}"
    squares = f", mean of {i.squares} squares" if i.squares > 1 else ""
    text = (
        f"{a} {_level(i.old[0])} to {_level(i.new[0])} has {ratio} times the effect with {b} {_level(i.new[1])} that "
        f"it has with {_level(i.old[1])}, {aim_of(i.split)} {n.number(i.target)}{squares}"
    )
    return text if i.determined else f"{text}; undetermined"


def _ranking(r: Ranking) -> str:
    """Dials by the size of their effects; ">" only where the one surely moves the critical batch more."""
    names = [
        f"{d.dial}{f' ({d.kind})' if d.kind != d.dial else ''} {n.number(d.size)} {n.interval(d.low, d.high)}"
        for d in r.dials
    ]
    text = names[0]
    for one, next_, name in zip(r.dials, r.dials[1:], names[1:], strict=False):
        text += (" > " if (one.dial, next_.dial) in r.above else ", ") + name
    text += f"; times, up or down, {aim_of(r.split)} {n.number(r.target)}"
    return text if r.determined else f"{text}; undetermined where no > stands"


def _level(value: float | str) -> str:
    return value if isinstance(value, str) else n.number(value)
