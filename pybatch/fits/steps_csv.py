"""Steps to target from a CSV file: one line a run, as people's own logs have them. No torch here."""

from __future__ import annotations

import csv
import difflib
import io
import math
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from pybatch.base.arguments import typed
from pybatch.base.errors import UsageError
from pybatch.fits.steps import fit_steps
from pybatch.fits.steps_checks import LEAST, MOST
from pybatch.fits.steps_data import DIVERGED
from pybatch.records import StepsFit

# What a column may be called, in lower case.
_NAMES = {
    "batch": ("batch", "batch_size", "batchsize", "bs", "global_batch", "global_batch_size"),
    "steps": ("steps", "steps_to_target"),
    "seed": ("seed", "run"),
    "rate": ("rate", "lr", "learning_rate"),
    "cap": ("cap", "max_steps"),
    "before": ("before",),
    "status": ("status",),
    "reached": ("reached", "reached_target"),
}
_ENDS = {  # of a run without a number of steps, in either column
    **dict.fromkeys(("inf", "+inf", "infinity", "not reached", "not_reached", "unreached", "capped", "dnf"), math.inf),
    **dict.fromkeys(("-inf", "diverged"), DIVERGED),
}
_WORDS = {
    "true": "reached",
    "yes": "reached",
    "1": "reached",
    "false": "not reached",
    "no": "not reached",
    "0": "not reached",
}
_SILENT = ("", "nan", "none", "null", "na", "n/a", "-", "--", "–", "?")
_THOUSANDS = re.compile(r"(>=?|≥|~|≈)?\s*(\d{1,3}(?:[,' _]\d{3})+|\d+(?:\.\d+)?)\s*(k?)\s*(steps)?", re.IGNORECASE)
_INSTEAD = dict.fromkeys(("examples", "samples", "images", "sequences"), "Give steps = examples / batch")
_INSTEAD |= dict.fromkeys(("epochs", "epoch"), "Give steps = epochs * examples of the training set / batch")
_INSTEAD |= {"tokens": "Give steps = tokens / tokens of a batch"}
_SHOWN = 40  # characters of a cell in an error


@dataclass(frozen=True)
class LoggedRuns:
    """Runs, one entry each in every list."""

    batches: list[float]
    seeds: list[str]
    steps: list[float]  # as in a table of `fit_steps`: inf not reached, -inf diverged
    rates: list[float] | None
    caps: list[float] | None  # nan where none is given
    before: list[float] | None  # nan where unknown


@typed
def fit_steps_csv(
    path: str | PathLike[str], *, model: str | None = None, seed: int = 0, resamples: int = 400
) -> StepsFit:
    """Critical batch sizes from a CSV file of runs; see `fit_steps`.

    Args:
        path: a file of comma-, semicolon- or tab-separated lines, the first with the names of the columns. `batch` and
            `steps` (to the target) must be there; `seed` (any name; else runs of a batch size and rate are numbered),
            `rate`, `cap` (steps at which a run was given up; else the most steps logged), `before` (the last evaluation
            above the target) and
            `status`, or `reached` (true or false), may; a run whose steps are its cap needs one of the last two. Of a
            run that did not reach the target, `steps` or `status` is "inf" or "not reached"; of one that diverged,
            "diverged". A run that nobody made has no line. Other columns are left alone.
        model, seed, resamples: as of `fit_steps`.

    Raises:
        UsageError: with the line and the value that cannot be read.
    """
    return fit_logged(read_runs(path), model=model, seed=seed, resamples=resamples)


def fit_logged(runs: LoggedRuns, *, model: str | None = None, seed: int = 0, resamples: int = 400) -> StepsFit:
    """The fit of runs that were read."""
    return fit_steps(
        runs.batches,
        runs.steps,
        seeds=runs.seeds,
        rates=runs.rates,
        cap=runs.caps,
        before=runs.before,
        model=model,
        seed=seed,
        resamples=resamples,
    )


def read_runs(path: str | PathLike[str]) -> LoggedRuns:
    """The runs of a file; raises UsageError with the line and the value that cannot be read."""
    rows = _rows(Path(path))
    columns = _columns(path, rows[0][1])
    if len(rows) < 2:
        raise UsageError(f"{_named(path)} has no line after its head. Give one line for each run.")
    cells = [_Cells(path, line, columns, row) for line, row in rows[1:]]
    rates = [cell.positive("rate") for cell in cells] if "rate" in columns else None
    runs = LoggedRuns(
        batches=[cell.positive("batch") for cell in cells],
        seeds=_seeds(cells, rates),
        steps=[cell.steps() for cell in cells],
        rates=rates,
        caps=_caps(cells),
        before=[cell.before() for cell in cells] if "before" in columns else None,
    )
    first: dict[tuple[float, str, float], int] = {}
    for k, cell in enumerate(cells):
        key = runs.batches[k], runs.seeds[k], rates[k] if rates is not None else 0.0
        if key in first:
            also = f" and rate {key[2]:g}" if rates is not None else ""
            text = f"batch {key[0]:g}, seed {key[1]!r}{also} stand in line {first[key]} already"
            raise cell.error(text, "Give each run one line, and a seed of its own")
        first[key] = cell.line
    return runs


def _caps(cells: list[_Cells]) -> list[float] | None:
    """Steps at which runs were given up; None where that is told of none, see `fit_steps`."""
    caps = [cell.cap() for cell in cells]
    if all(map(math.isnan, caps)):
        return None
    for cell, cap in zip(cells, caps, strict=True):
        if cell.steps() == math.inf and math.isnan(cap):
            remedy = (
                "Give the steps at which it was given up in a column 'cap', as of the others, or leave all of them out"
            )
            raise cell.error("a run that did not reach the target has no cap", remedy)
    return caps


class _Cells:
    """A line of the file: its values by column, or an error with the line, the value and the remedy."""

    def __init__(self, path: str | PathLike[str], line: int, columns: dict[str, int], row: list[str]) -> None:
        self.path, self.line, self.columns = path, line, columns
        if len(row) != (wanted := columns["of"]):
            raise self.error(f"{len(row)} cells where the head has {wanted}", "Give every line as many")
        self.row = [cell.strip() for cell in row]

    def error(self, what: str, remedy: str) -> UsageError:
        return UsageError(f"{_named(self.path)}, line {self.line}: {what}. {remedy}.")

    def text(self, name: str) -> str:
        return self.row[self.columns[name]] if name in self.columns else ""

    def positive(self, name: str) -> float:
        """A number in the range of batch sizes and steps."""
        text = self.text(name)
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not LEAST <= value <= MOST:
            what = f"{name} {_cut(text)!r} is no number from {LEAST:g} to {MOST:g}"
            raise self.error(what, _plainer(text, name) or f"Give the {name}")
        return value

    def steps(self) -> float:
        """Steps, or how the run ended without."""
        text, status = self.text("steps").lower(), self.status()
        if status not in ("", "reached", *_ENDS):
            known = "reached, not reached or diverged"
            raise self.error(f"status {_cut(status)!r} is not known", f"Write {known}")
        end = _ENDS.get(status, _ENDS.get(text))
        if status == "reached" and text in _ENDS:
            raise self.error(f"status 'reached' beside steps {text!r}", "Give the steps it took, or another status")
        if end is not None:  # a number beside it is how far the run went
            return end
        if text in _SILENT:
            remedy = "Write inf for a run that did not reach the target, diverged for one that did that"
            raise self.error(f"steps {text!r} say nothing", f"{remedy}; one that nobody made has no line")
        return self.positive("steps")

    def status(self) -> str:
        """How the run ended, from a column of that name or one that says whether it reached; "" where neither does."""
        status, told = self.text("status").lower(), self.text("reached").lower()
        if told and told not in _WORDS:
            raise self.error(f"reached {_cut(self.text('reached'))!r} is not known", "Write true or false")
        if told and status and (status == "reached") != (_WORDS[told] == "reached"):
            raise self.error(f"status {_cut(self.text('status'))!r} beside reached {told!r}", "Leave one of them out")
        return status or _WORDS.get(told, "")

    def cap(self) -> float:
        """Steps at which the run was given up: its cap, or its steps where the status says that they did not suffice;
        nan where neither is told."""
        steps = self.steps()
        if self.text("cap"):
            cap = self.positive("cap")
            if math.isfinite(steps) and steps > cap:
                raise self.error(f"steps {steps:g} are above the cap of {cap:g}", "Give the true cap")
            if steps == cap and not self.status() and not self.text("before"):
                text = f"steps {steps:g} are the cap: whether the run reached the target is not told"
                raise self.error(text, "Write inf for one that did not, or 'reached' in a column 'status'")
            return cap
        if steps != math.inf:
            return math.nan
        if self.text("steps") and self.text("steps").lower() not in _ENDS:
            return self.positive("steps")
        return math.nan

    def before(self) -> float:
        """The last evaluation above the target."""
        text, steps = self.text("before"), self.steps()
        if text == "" or not math.isfinite(steps):
            return math.nan
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value < steps:
            text = f"before {_cut(text)!r} is no number from 0 to below the steps of {steps:g}"
            raise self.error(text, "Give the last evaluation above the target, or nothing")
        return value


def _plainer(text: str, name: str) -> str | None:
    """How to write a whole number that has a k, thousands apart or a sign before it; None where it is none of these."""
    found = _THOUSANDS.fullmatch(text)
    if found is None or name == "rate":
        point = re.fullmatch(r"\d+,\d+", text)
        return f"Write {text.replace(',', '.')}, with a decimal point" if point is not None else None
    sign, digits, unit, counted = found.groups()
    if unit and name == "batch":
        return f"Write the number: {digits}000, or {float(digits) * 1024:.15g}" if digits.isdigit() else None
    value = float(re.sub("[,' _]", "", digits)) * (1000.0 if unit else 1.0)
    plain = f"{value:.15g}"
    if plain == text or not LEAST <= value <= MOST or (counted and name not in ("steps", "cap")):
        return None
    if sign and name == "steps":
        return f"Write inf for a run that did not reach the target, and {plain} in a column 'cap'"
    return None if sign else f"Write {plain}, without unit or separator"


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """Lines that are not empty, with their numbers; the first is the head."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        head = text.partition("\n")[0]
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count))
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except OSError as error:
        raise UsageError(f"{_named(path)} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{_named(path)} is not a CSV file ({error}). Give lines of text: batch,seed,steps.") from None
    if not rows:
        raise UsageError(f"{_named(path)} is empty. Give a head, batch,seed,steps, and one line for each run.")
    return rows


def _columns(path: str | PathLike[str], head: list[str]) -> dict[str, int]:
    """Where each known column is, and under "of" how many there are."""
    found: dict[str, int] = {"of": len(head)}
    names = {alias: name for name, aliases in _NAMES.items() for alias in aliases}
    own = ["_".join(cell.lower().split()) for cell in head]
    each = [text for text in own if re.fullmatch(r"(seed|run|steps)_?\d+", text)]
    if len(each) > 1 and not any(names.get(text) == "steps" for text in own):
        raise UsageError(f"{_named(path)}, line 1: a column for each run. Give one line for each: batch,seed,steps.")
    for place, text in enumerate(own):
        name = names.get(text)
        if name in found:
            raise UsageError(f"{_named(path)}, line 1: two columns for {name}. Rename the one that is not meant.")
        if name is not None:
            found[name] = place
    for text, cell in zip(own, head, strict=True):
        near = difflib.get_close_matches(text, names, 1, cutoff=0.7) if text not in names else []
        # Other columns are left alone, but for what can only be a slip.
        slip = near and (
            names[near[0]] in ("batch", "steps") or sorted(text) == sorted(near[0]) or text[:-1] == near[0]
        )
        if slip and names[near[0]] not in found:
            asked = f"column {_cut(cell.strip().lower())!r}: is it {near[0]!r}? Name it so, or remove it."
            raise UsageError(f"{_named(path)}, line 1: {asked}")
    for name in ("batch", "steps"):
        if name not in found:
            columns = ", ".join(_cut(cell.strip().lower()) for cell in head)
            remedy = next((_INSTEAD[text] for text in own if name == "steps" and text in _INSTEAD), f"Name it {name}")
            raise UsageError(f"{_named(path)}, line 1: no column {name!r} in {_cut(columns)!r}. {remedy}.")
    return found


def _seeds(cells: list[_Cells], rates: list[float] | None) -> list[str]:
    """Names of the runs' seeds; runs of a batch size and a rate are numbered where the file has none."""
    if cells and "seed" in cells[0].columns:
        for cell in cells:
            if not cell.text("seed"):
                raise cell.error("no seed", "Name one in every line, or leave the column out")
        return [cell.text("seed") for cell in cells]
    seen: dict[tuple[float, float], int] = {}
    numbers = []
    for k, cell in enumerate(cells):
        key = cell.positive("batch"), rates[k] if rates is not None else 0.0
        seen[key] = seen.get(key, 0) + 1
        numbers.append(str(seen[key]))
    return numbers


def _named(path: str | PathLike[str]) -> str:
    return repr(str(path))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
