"""The study's records as they lie in the repository: which are whole, and which speak of a problem."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pybatch.commands.saved import read_run
from pybatch.records import Run
from study.declaration import DOMAINS, PARTS, Record


@dataclass(frozen=True)
class Study:
    """All records that are whole, by their path below the folder."""

    found: dict[str, Run]

    def of(self, records: Iterable[Record]) -> dict[str, dict[str, Run]]:
        """Those that are there, by problem and kind."""
        made: dict[str, dict[str, Run]] = {}
        for record in records:
            if (run := self.found.get(record.path)) is not None:
                made.setdefault(record.problem.name, {})[record.kind] = run
        return made

    def problems(self) -> dict[str, dict[str, Run]]:
        """Every problem of the domains with its records; those of the quick part where the whole one has none.

        An advice and its judge are of one part: kinds that are measured against each other are not mixed.
        """
        quick = self.of(PARTS["quick"])
        made = {}
        for domain, problems in DOMAINS.items():
            rules, advice = self.of(PARTS[domain]), self.of(PARTS[f"{domain}-advice"])
            others = self.of(PARTS["optimizers"])
            for problem in problems:
                own = quick.get(problem.name, {})
                swept = rules.get(problem.name) or {k: run for k, run in own.items() if k == "sweep"}
                told = advice.get(problem.name) or {k: run for k, run in own.items() if k != "sweep"}
                if found := {**swept, **told, **others.get(problem.name, {})}:
                    made[problem.name] = found
        return made

    def factorial(self) -> list[Run]:
        return [self.found[r.path] for r in PARTS["factorial"] if r.path in self.found]

    def measured(self, part: str) -> tuple[int, int]:
        """Records of a part that are whole, and all of them."""
        return sum(record.path in self.found for record in PARTS[part]), len(PARTS[part])


def read(folder: Path) -> Study:
    """All whole records of the declaration in this folder."""
    found = {}
    for record in (record for records in PARTS.values() for record in records):
        path = folder / record.path
        if path.exists() and (run := read_run(path)).complete:
            found[record.path] = run
    return Study(found)
