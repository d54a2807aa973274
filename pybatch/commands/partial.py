"""The record of a run that is still going on, beside its output, so that a run that is cut can be continued."""

from __future__ import annotations

from pathlib import Path

from pybatch.base.errors import UsageError
from pybatch.base.plain import visible
from pybatch.base.terminal import tell
from pybatch.commands.saved import read_run
from pybatch.records import Run
from pybatch.report.formats.text import format_of
from pybatch.report.output import Output


class PartialRecord:
    """`run.json.partial` beside `run.json`: replaced in one step as the run grows, and taken away at its end."""

    def __init__(self, output: Path) -> None:
        self.output = output.absolute()  # a workload may change the working directory
        self.path = self.output.with_name(f"{output.name}.partial")
        self._works = True

    def write(self, run: Run) -> None:
        """Save the record so far. Where that fails, the run goes on without, and says so once."""
        if not self._works:
            return
        try:
            with Output(self.path) as file:
                file.write(run.to_json() + "\n")
        except (OSError, UsageError) as error:
            self._works = False
            tell(visible(f"the run goes on, but could not be continued after a crash: {error}"))

    def earlier(self) -> Run | None:
        """The run to go on with: what a crash left or the output, whichever is newer; None where there is neither.

        Raises:
            UsageError: the file is no record.
        """
        there = [path for path in (self.path, self.output) if path.exists()]
        if there:
            return read_run(max(there, key=lambda path: path.stat().st_mtime_ns))  # the first of equals
        tell(visible(f"there is no {self.output.name} to go on with; the run starts anew"))
        return None

    def discard(self) -> None:
        """Take the file away: the output holds all of it."""
        self.path.unlink(missing_ok=True)


def partial_record(output: Path | None, format_: str | None, resume: bool) -> PartialRecord | None:
    """The partial record of a run with this output; None where the output is no JSON.

    Raises:
        UsageError: a run is to be continued whose output cannot be read back.
    """
    json = output is not None and (format_ or format_of(output)) == "json"
    if output is not None and json and (not output.exists() or output.is_file()):
        return PartialRecord(output)
    if resume:
        what = f"{str(output)!r} is none" if output is not None else "none is given"
        raise UsageError(f"--resume goes on with a saved record, and {what}. Add -o RUN.json, the file of the run.")
    return None
