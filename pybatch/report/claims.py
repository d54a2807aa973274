"""The claims of the seed paper as a section of the report."""

from __future__ import annotations

from pybatch.answer.claims import check_claims, notes_on_claims
from pybatch.records import Run
from pybatch.report.layout import Section

MISSING = "not measured"
TITLE = "Claims of Golmant et al. (2018), on this workload"


def sections(run: Run) -> list[Section]:
    """One line a claim: what was found, and the figures it was found by. None of a run without a sweep."""
    claims = check_claims(run)
    if not claims or run.convergence is None:
        return []
    lines = tuple((claim.name, f"{claim.finding}: {claim.text}") for claim in claims if claim.finding != MISSING)
    if not lines:  # with two batch sizes that reach a target there is a finding on cost
        return [Section(TITLE, notes=(f"{MISSING}: fewer than two batch sizes reached a target",))]
    lacking: dict[str, list[str]] = {}  # claims by what they lack
    for claim in claims:
        if claim.finding == MISSING:
            lacking.setdefault(claim.text, []).append(claim.name)
    notes = tuple(f"{', '.join(names)}: {MISSING}, {why}" for why, names in lacking.items())
    return [Section(TITLE, lines=lines, notes=(*notes, *notes_on_claims(run.convergence)))]
