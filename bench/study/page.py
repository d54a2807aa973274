"""Writes docs/study.md and its pictures from the records of the study.

    python bench/study/page.py            # the pictures need Chromium: pip install '.[png]'

A test writes the page again and compares.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts beside this folder

from pybatch.base import numerals as n
from pybatch.report.plot import Plot
from study import advice, claims
from study.claims import Answer, Records, Row
from study.declaration import DOMAINS, GAP_EPOCHS, PARTS, QUICK_SEEDS
from study.pictures import digest, pictures
from study.records import Study, read

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "bench" / "results" / "study"
PAGE = ROOT / "docs" / "study.md"
PICTURES = PAGE.with_suffix("")
DRAWN = PICTURES / "drawn.json"  # digests of what each picture shows and of its file, written after them

_HEAD = """<!-- Written by bench/study/page.py from bench/results/study. -->
# The study: the seed paper's claims, and whether our advice pays

Golmant et al. 2018 ([arXiv:1811.12941](https://arxiv.org/abs/1811.12941)) asked four questions of large batches, in
image classification, segmentation and language modelling. Here they are asked of pybatch's own workloads on one
machine, by its own commands: `python bench/study/run.py` measures, `--list` prints the commands, and
`python bench/study/page.py` writes this page. *Holds* and *does not hold* are said where 95 % intervals leave no doubt,
or runs that did not reach leave 5 % to chance, and never of an interval that spans a factor of 100 or of times taken
once, on a disturbed machine; all else is *undetermined*.

The *critical batch* is where a run to the target takes twice the fewest examples, by a curve fitted to the steps at all
batch sizes; steps *level off* where doubling the batch saves less than 10 % of them; past the *saturation batch* it
gains less than 5 % throughput. All three, and *B_simple*, the gradient noise scale, are in examples: images of `digits`
and `scenes`, sequences of `text`. In brackets stand 95 % intervals. Another optimizer has another critical batch: each
table names its own.
"""
_OWN = """## What to do with your own model

1. `pybatch watch train.py -o run.json`, or `pybatch bench --workload mymodel.py:MyWorkload -o run.json`: the batch to
   use, with its interval, in about a minute.
2. Before a long training, or where that interval is wide, and with such a workload file, `pybatch sweep --workload
   mymodel.py:MyWorkload --target train=2.5 --batch '8-512*2' --store runs.db`; then `pybatch report run.json runs.db`
   advises by both. `bench --thorough` takes less time, and stands for less.
3. Where confidence is low for the machine's sake, give it a quiet one.
4. When you change the batch, tune the rate again: a rule may hold to some batch size and fail past it, see RQ3.
5. Past the critical batch buy fewer devices, not a larger batch; `pybatch schedule` may grow it with the noise.
"""


def page(study: Study) -> str:
    """The whole page as Markdown."""
    problems = study.problems()
    drawn = pictures(problems)
    asked = {
        "RQ1: do steps stop falling?": (claims.levels_off(problems), "digits", "in every network it trained"),
        "RQ2: is the critical batch below what this machine can take?": (
            claims.below_capacity(problems),
            "digits",
            "on its GPUs, mostly far below",
        ),
        "RQ3: do rules fail, and where?": (
            claims.rules_fail(problems),
            "digits",
            "before the device is full, and each domain at a place of its own",
        ),
        "RQ4: what moves the critical batch?": (
            claims.size_matters_least(study.factorial()),
            "factorial",
            "comparing data sets and networks",
        ),
        "Counter-arm, Shallue et al. 2018: the gap of test and train loss": (
            claims.generalizes_worse(problems),
            "digits",
            "where rates were tuned at each batch size",
        ),
        "Does the noise scale predict the critical batch?": (
            claims.noise_predicts(problems),
            "digits-advice",
            "within a factor of its own on each task (arXiv:1812.06162)",
        ),
        "Optimizers: SGD, AdamW, Muon": (
            claims.optimizers_differ(problems),
            "optimizers",
            "of language models (arXiv:2505.02222)",
        ),
    }
    between = claims.architectures(problems)
    below = {
        "RQ1": _picture([plot for plot in drawn if plot.name != "headline"]),
        "RQ2": _picture([plot for plot in drawn if plot.name == "headline"]),
        "RQ3": "A rule *fails* at the first batch size where it surely takes over twice the tuned steps, or where "
        "fewer of its runs reach than chance would have it; up to *holds to* nothing speaks against it.\n",
        "RQ4": "The factorial is declared for `digits` alone: elsewhere RQ4 stays open in size and complexity. Its "
        "target is the train loss, taken on the images that are trained on."
        + "".join(f" {said}." for said in ["Architectures in each domain: " + "; ".join(between)] if between)
        + "\n",
        "Counter-arm, Shallue et al. 2018": "At equal epochs and steps `digits` alone is compared: its runs go on "
        f"to {GAP_EPOCHS} epochs.\n",
    }
    questions = []
    for title, (answer, part, paper) in asked.items():
        questions += [_question(title, answer, part, paper), below.get(title.partition(":")[0], "")]
    against = _against({title: answer for title, (answer, _, _) in asked.items()})
    body = [_HEAD, _state(study), _regret(problems), *questions, against, _noise(problems), _OWN, _parts(study)]
    return "\n".join(part for part in body if part)


def _state(study: Study) -> str:
    """When and where it was run, and how much of it."""
    runs = list(study.found.values())
    if not runs:
        return "**Not run yet.**\n"
    devices = {m.device for r in runs if (m := r.capacity or r.convergence) is not None and m.device}
    places = sorted({f"{device.name}, {device.cores} cores" for device in devices})
    if len(places) > 1:
        raise SystemExit(
            f"records of several devices, {'; '.join(places)}: a study is of one. Measure the others again."
        )
    where = places[0] if places else "a device that no record names"
    commits = sorted({r.environment.commit[:7] for r in runs if r.environment is not None and r.environment.commit})
    days = sorted({run.created[:10] for run in runs if run.created})
    timed = [r.capacity for path, r in study.found.items() if r.capacity is not None and "-advice." not in path]
    busy = sum(map(advice.disturbed, timed))
    when = " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "no day that a record names"
    dirty = any(r.environment is not None and (r.environment.commit or "").endswith("-dirty") for r in runs)
    at = f"{', '.join(commits) or 'that no record names'}{', some with changes not committed' * dirty}"
    text = f"Measured on {where}, {when}, at commits {at}; "
    text += "[what was run](#what-was-run) is at the end. The quick part stands in for a whole one that is not run: "
    text += f"fewer batch sizes, {QUICK_SEEDS} seeds, wider intervals. Steps hardly depend on the machine's load; "
    text += f"{busy} of {n.counted(len(timed), 'record')} with step times {'is' if busy == 1 else 'are'} "
    text += "of a machine whose speed changed meanwhile, as pybatch itself noticed: such times judge where they were "
    text += "taken several times, with what those differ by in the interval, and not alone; what disturbed all of them "
    text += "alike is not seen."
    there = study.problems()
    lacking = [problem.name for problems in DOMAINS.values() for problem in problems if problem.name not in there]
    return text + (f" **Not run yet**: {', '.join(lacking)}.\n" if lacking else "\n")


def _parts(study: Study) -> str:
    """How much of each part there is."""
    rows = []
    for part in PARTS:
        done, whole = study.measured(part)
        state = "whole" if done == whole else f"`python bench/study/run.py --part {part}` measures what is missing"
        rows.append((part, f"{done} of {whole}", state))
    return f"## What was run\n\n{_table(('part', 'records', ''), rows)}"


def _regret(problems: Mapping[str, Records]) -> str:
    """First what a user is owed: what following the advice costs."""
    heads = (
        "problem",
        "advised by",
        "batch",
        "fastest",
        "regret",
        "goal",
        "",
        "by times alone",
        "critical batch taken",
    )
    found = {name: advice.judged(records) for name, records in problems.items()}
    rows = [
        (
            name,
            row.by,
            n.count(row.batch),
            n.count(row.best),
            claims.within(row.regret, row.low, row.high),
            f"{row.goal:.2f}",
            row.met,
            n.number(row.measured),
            row.remark,
        )
        for name, judged in found.items()
        for row in judged
    ]
    met = advice.goals_met([row for judged in found.values() for row in judged])
    text = (
        "Regret is the time to the train target at the batch advised over that at the best one, by curves through a "
        "sweep of other seeds, with AdamW and its rate tuned at each batch size, and through step times measured "
        "apart; beside it that of the measured times alone, over the least of them, which is too low by chance. "
        "The goal is what the kind of evidence is meant to come to. What branches stand for, and from where on a run "
        "they begin, was set on other runs of these problems ([how](../bench/results/NOTES-regret.md)), none of which "
        "judges. "
    )
    judges = {name: told for name, records in problems.items() if (told := advice.judge_of(records))}
    below = "".join(f"- {name}, the judge: {'; '.join(told)}.\n" for name, told in judges.items())
    return f"## Does the advice pay?\n\n{text}{met.capitalize()}.\n\n{_table(heads, rows)}\n{below}"


def _question(title: str, answer: Answer, part: str, paper: str) -> str:
    """A claim with its evidence.

    Args:
        title, answer: of the question.
        part: which measures it.
        paper: where the claim's own paper found it.
    """
    said = f"**{answer.finding.capitalize()}**: {answer.claim} ({answer.text}). The paper found so {paper}"
    said += "; here the rows that say otherwise speak against it." if answer.finding == "does not hold" else "."
    if not answer.rows:
        return f"## {title}\n\n{said} Not run: `python bench/study/run.py --part {part}`.\n"
    below = "".join(f"- {text}\n" for text in answer.below)
    table = _table(answer.heads, [row.cells for row in answer.rows])
    return f"## {title}\n\n{said}\n\n{table}" + (f"\nWhat takes from their word:\n\n{below}" if below else "")


def _against(asked: Mapping[str, Answer]) -> str:
    """Where the paper's claims do not hold here, case by case."""
    found = []
    for title, answer in asked.items():
        cases = [", ".join(cell for cell in row.cells[:-1] if cell) for row in answer.rows if _denies(row)]
        if cases or answer.finding == "does not hold":
            found.append(f"- **{title}** {answer.claim}: not so in {'; '.join(cases) or answer.text}.")
        found += [f"- **{title}** {said}." for said in answer.against]
    text = "\n".join(found) or (
        "Nowhere that is sure: no case above speaks against a claim beyond its interval. What is undetermined is so "
        "for the width of an interval, of few seeds or of batch sizes that end too early."
    )
    return f"## Where we disagree\n\n{text}\n"


def _denies(row: Row) -> bool:
    return row.finding == "does not hold"


def _noise(problems: Mapping[str, Records]) -> str:
    """The noise scale at both ends of the trainings along which it was read."""
    rows = []
    for name, records in problems.items():
        for i, (first, last, others) in enumerate(claims.along(records)):
            ends = [
                (
                    f"{n.count(p.first_step)} to {n.count(p.last_step)}",
                    claims.within(p.b_simple, p.low, p.high),
                )
                for p in (first, last)
            ]
            rows.append((name, str(i), *ends[0], *ends[1], str(others)))
    if not rows:
        return ""
    heads = ("problem", "seed", "steps", "B_simple", "steps", "B_simple", "stretches not shown")
    text = (
        "At about the critical batch, AdamW at the tuned rate: the first and the last stretch that gives an interval."
    )
    return f"## The noise scale along a training\n\n{text}\n\n{_table(heads, rows)}"


def _picture(drawn: Sequence[Plot]) -> str:
    return "\n".join(f"![{plot.title}]({PICTURES.name}/{plot.name}.png)\n\n*{plot.caption}*\n" for plot in drawn)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def main() -> None:
    from pybatch.report.formats.png import write_plots

    study = read(RECORDS)
    text, drawn = page(study), pictures(study.problems())
    with tempfile.TemporaryDirectory() as folder:
        made = write_plots(drawn, folder) if drawn else []  # before anything that was there goes
        PAGE.write_text(text)
        PICTURES.mkdir(exist_ok=True)
        for old in PICTURES.glob("*.png"):
            old.unlink()
        for path in made:
            shutil.copy(path, PICTURES / path.name)
    DRAWN.write_text(json.dumps({plot.name: [digest(plot), of_file(plot)] for plot in drawn}, indent=1) + "\n")


def of_file(plot: Plot) -> str:
    """Digest of a picture as it lies in the folder."""
    return hashlib.sha256((PICTURES / f"{plot.name}.png").read_bytes()).hexdigest()[:16]


if __name__ == "__main__":
    main()
