"""A user's own training under observation, as one run: its steps, its noise, capacity around its batch, the verdict."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn

from pybatch.answer.input import with_input
from pybatch.answer.own import with_own
from pybatch.answer.verdict import advise
from pybatch.base.arguments import typed
from pybatch.base.errors import PybatchError, UsageError
from pybatch.base.numerals import count, counted, number, share
from pybatch.base.plain import unwritten, visible
from pybatch.base.progress import ProgressLine, looked_at
from pybatch.device.environment import capture
from pybatch.device.identity import usable_cores
from pybatch.jobs.options import WatchOptions, waiting_for
from pybatch.records import Capacity, NoiseScale, Note, Run
from pybatch.records.noise import unmeasured
from pybatch.report.formats.html import write_report
from pybatch.report.formats.text import format_of, notes_in, print_run, render
from pybatch.report.output import Output
from pybatch.watch import summary
from pybatch.watch.by_hand import BACKWARDS
from pybatch.watch.doubts import with_doubts
from pybatch.watch.finding import plain_name
from pybatch.watch.noise import REMEDY
from pybatch.watch.observer import Observer, Subject
from pybatch.watch.replay import Replay, replay
from pybatch.watch.together import Together, together
from pybatch.workloads.base import Progress

_NEWEST = 50  # steps whose times a live line tells
_SAVE_EVERY = 10.0  # s between records of what there is so far, at least
_TELL_EVERY = 1.0  # s between states of a live line
_SAVE_SHARE = 0.002  # of the time that they may take
INTERRUPTED = "interrupted by Ctrl-C: what was measured until then is kept"


class Enough(SystemExit):
    """The steps asked for are made: ends the script, which can see it, with status 0."""


class Watching:
    """Watches the training of this process from `start` until `finish`, which gives the run.

    Args:
        options: how.
        say: told what a user must know, a line each.
        progress: called with (what is being done, share done) in the replays, and with the state of the training.
        on_partial: called with the record so far, now and then, for a caller who keeps it.
    """

    def __init__(
        self,
        options: WatchOptions,
        *,
        say: Callable[[str], None] = lambda text: None,
        progress: Progress = lambda text, share: None,
        on_partial: Callable[[Run], None] | None = None,
    ) -> None:
        self.options, self._say, self.progress, self._on_partial = options, say, progress, on_partial
        self._observer = Observer(options.index, self._found, self._stepped, options.steps)
        self._created = datetime.now(UTC).isoformat(timespec="seconds")
        self._environment = capture(seed=0, command=options.command)
        self._meter: summary.Meter | None = None
        self._saved, self._save_after = time.monotonic(), _SAVE_EVERY
        self._told = 0.0
        self._newest: NoiseScale | None = None  # as it was last read
        self._noise: NoiseScale | None = None
        self._capacity: Capacity | None = None
        self._why_not: str | None = None  # why there is no capacity around the batch
        self._ended = False  # whether what can only be had while the training stands was had
        self._destroy: Any = None
        self._children = 0.0  # seconds that child processes had taken before

    def start(self) -> None:
        """Begin; before any of the training is imported where it can be."""
        self._children = summary.child_seconds()
        self._observer.start()
        if dist.is_available():
            self._destroy = dist.destroy_process_group
            dist.destroy_process_group = self._before_end

    @property
    def rank(self) -> int:
        """Of this process, where several train together."""
        return dist.get_rank() if dist.is_available() and dist.is_initialized() else int(os.environ.get("RANK", "0"))

    def finish(self, *notes: Note, measure: bool = True) -> Run | None:
        """The run: once the training has ended, or been interrupted.

        Args:
            notes: what cut it short.
            measure: whether to run the last pass again at other batch sizes; without it there is no verdict.

        Returns:
            None where no optimizer stepped; `problem` then says why.
        """
        try:
            if measure:
                self._measure()
        finally:
            self._stop()
        if self._observer.subject is None:
            return None
        return self._record(notes, judged=measure)

    @property
    def watches(self) -> bool:
        """Whether a training was found."""
        return self._observer.subject is not None

    @property
    def problem(self) -> str:
        """Why nothing was measured, and what may help."""
        stepped = self._observer.optimizers
        index = self.options.index
        if index is not None and stepped and index >= len(stepped):
            return f"--optimizer-index {index}: {counted(len(stepped), 'optimizer')} stepped. Give less, from 0 on."
        if stepped:
            return "an optimizer stepped once only: a training has two steps at least"
        children = summary.child_seconds() - self._children
        if children > 1.0:
            return (
                f"no optimizer of torch.optim stepped in this process, and its child processes ran for "
                f"{number(children)} s. Start the processes with 'torchrun -m pybatch watch SCRIPT', or write "
                "'with pybatch.watch():' around the training in the function that they run"
            )
        return (
            "nothing was measured: what was looked for is a torch.optim.Optimizer that steps in this process, or "
            f"{BACKWARDS} backward passes of one model without one. Watch the script that trains"
        )

    @property
    def fault(self) -> Exception | None:
        """What pybatch itself failed by, which ended the observation."""
        return self._observer.fault

    # While it runs.

    def _found(self, subject: Subject) -> None:
        if self.rank != 0:
            return
        optimizers = self._observer.optimizers
        kind = type(subject.optimizer).__name__
        self._meter = summary.Meter(subject.device)
        self._environment = replace(self._environment, threads=torch.get_num_threads())  # as the script has set them
        if subject.model is None:
            self._say(f"{kind} steps, but no module with its parameters was called where it can be seen")
            return
        text = f"watching {plain_name(subject.model)} ({count(subject.trained.parameters)} parameters)"
        text += " with updates of the script's own" if self._observer.hand is subject.optimizer else f" with {kind}"
        if len(optimizers) > 1 and subject.optimizer in optimizers:
            at = next(i for i, one in enumerate(optimizers) if one is subject.optimizer)
            others = ", ".join(f"{i} {type(one).__name__}" for i, one in enumerate(optimizers) if i != at)
            text += f", optimizer {at} of {len(optimizers)}; --optimizer-index takes another: {others}"
        self._say(text)

    def _stepped(self) -> None:
        steps = self._observer.steps
        assert steps is not None
        now = time.monotonic()
        if now - self._told >= _TELL_EVERY:
            try:
                if self.rank == 0 and now - self._saved >= self._save_after:
                    self._save(now)
                else:
                    self._tell(now)
            except Exception as error:
                self._observer.fault = error  # which ends the observation, and not the training
        if self.options.steps is not None and steps.count >= self.options.steps:
            raise Enough(0)

    def _save(self, now: float) -> None:
        """Hand out the record so far, as seldom as it takes little of the training's time."""
        run = self._record((Note("run", "cut: this is what was saved while it ran"),), judged=False)
        if self._on_partial is not None:
            self._on_partial(run)
        self._newest = run.noise
        self._tell(now)
        if self._observer.steps is not None:
            self._observer.steps.unusual()
        self._saved = time.monotonic()
        self._save_after = max(_SAVE_EVERY, (self._saved - now) / _SAVE_SHARE)

    def _tell(self, now: float) -> None:
        """The state of the training in one line."""
        steps, self._told = self._observer.steps, now
        assert steps is not None  # the callers have stepped
        parts, newest = [f"step {count(steps.count)}"], list(steps.kept)[-_NEWEST:]
        if newest:
            whole = sum(step.seconds for step in newest)
            parts.append(f"{number(1e3 * whole / len(newest))} ms")
            if loading := sum(step.loading for step in newest):
                parts.append(f"{share(min(1.0, loading / whole))} of it waiting for data")
        if self._newest is not None and self._newest.b_simple is not None:
            parts.append(f"noise scale {number(self._newest.b_simple, 2)}")
        self.progress(", ".join(parts), 0.0)

    # Its end.

    def _before_end(self, *args: Any, **kwargs: Any) -> Any:
        """The script takes its process group away: what takes all processes is measured now.

        Not where it does so because it failed, or was interrupted: the others may not come here.
        """
        failing = sys.exc_info()[1]
        if failing is None or isinstance(failing, Enough):
            self._measure()
        return self._destroy(*args, **kwargs)

    def _measure(self) -> None:
        """Read the noise, take all hooks off, and run the last pass again. Once."""
        if self._ended:
            return
        self._ended = True
        observer, subject = self._observer, self._observer.subject
        self._noise = observer.noise.read() if observer.noise is not None else None
        observer.stop()  # before the replay: repeated gradients have no noise
        if self._meter is not None:
            self._meter.stop()
        if subject is None or subject.model is None:
            return
        self._why_not = self._refusal(subject)
        several = together(subject.device)
        if several is not None and several.any(self._why_not is not None):
            self._why_not = self._why_not or "another process can't run its pass again"
        if self._why_not is None:
            self._replay(subject, subject.model, several)

    def _refusal(self, subject: Subject) -> str | None:
        """Why the pass can't be run again at other sizes."""
        kept = self._observer.kept
        if subject.closures:
            kind = type(subject.optimizer).__name__
            return f"{kind}.step(closure) evaluates the model several times a step, which can't be run again without it"
        if subject.trained.others:
            names = ", ".join(plain_name(model) for model in subject.trained.others)
            return f"the step calls several models ({names} beside), whose passes follow from one another"
        if kept is None:
            return "no forward pass with a tensor among its arguments, and a gradient at its output, was seen"
        return None

    def _replay(self, subject: Subject, model: nn.Module, several: Together | None) -> None:
        observer = self._observer
        assert observer.kept is not None  # `_refusal` has looked
        what = Replay(
            observer.kept,
            subject.optimizer,
            observer.optimizers,
            subject.device,
            summary.info(self.options.name, subject, observer),
            self.options.time_budget,
            flops=not subject.marks,
            progress=self.progress,
            together=several,
        )
        try:
            found = replay(what)
        except PybatchError as error:
            self._why_not = str(error)
            return
        if observer.hand is subject.optimizer:
            note = Note("batches.step_ms", "the update, which the script makes by hand, is not in these steps")
            found = replace(found, notes=(*found.notes, note))
        self._capacity = found

    def _stop(self) -> None:
        if self._noise is None and self._observer.noise is not None:
            self._noise = self._observer.noise.read()
        self._observer.stop()
        if self._destroy is not None and dist.destroy_process_group == self._before_end:
            dist.destroy_process_group = self._destroy
        self._ended = True

    def _record(self, notes: tuple[Note, ...], *, judged: bool) -> Run:
        observer, subject = self._observer, self._observer.subject
        assert subject is not None  # the callers have looked
        training = summary.training(self.options.name, subject, observer, self._meter)
        noise = self._noise
        if noise is None and observer.noise is not None and not self._ended:
            noise = observer.noise.read()
        if noise is not None:
            noise = noise.until(training.steps)
        lacking = list(notes)
        if noise is None and subject.model is not None:
            reasons = "; ".join(dict.fromkeys(observer.noise.reasons)) if observer.noise is not None else ""
            lacking.append(Note("noise", f"not measured: {reasons or 'too few steps were made'}. {REMEDY}"))
        capacity = self._capacity
        if capacity is None:
            reason = self._why_not
            capacity = summary.own_batch(
                training, summary.info(self.options.name, subject, observer), subject.device, reason
            )
        verdict = None
        if judged:
            verdict = with_input(advise(capacity, noise or unmeasured(lacking)), training, usable_cores())
            if self._capacity is not None:
                verdict = with_own(verdict, capacity, noise, training)
            verdict = with_doubts(verdict, capacity, training if self._capacity is not None else None)
        complete = judged and not notes
        return Run(
            self._created,
            self._environment,
            capacity,
            noise,
            None,
            verdict,
            complete,
            tuple(lacking),
            training=training,
        )


class watch:  # it reads as the verb it is: `with pybatch.watch(): train()`
    """Watch the training in this context, as `pybatch watch` does a script's: in a notebook, or in a function.

    `with pybatch.watch() as watched: train()` prints the verdict to stderr at its end, and `watched.run` is the record.
    The training goes on afterwards as if it had not been watched.

    Args:
        output: a file to write the record to, which grows while the training runs; its ending says the format.
        html: a file for the report as one page.
        optimizer_index: of several optimizers, by first step, from 0. None: that with most parameters.
        time_budget: seconds at the end for other batch sizes: the last pass, run again. 0: none.
        quiet: print nothing.

    Raises:
        UsageError: an argument out of range, or a file that can't be written.
    """

    @typed
    def __init__(
        self,
        output: str | Path | None = None,
        *,
        html: str | Path | None = None,
        optimizer_index: int | None = None,
        time_budget: float = 30.0,
        quiet: bool = False,
    ) -> None:
        if not 0 <= time_budget < math.inf:
            raise UsageError(f"time budget {time_budget!r} s: give 0 or more.")
        if optimizer_index is not None and optimizer_index < 0:
            raise UsageError(f"optimizer_index {optimizer_index}: they are counted by first step, from 0 on.")
        self.run: Run | None = None
        self._output, self._html, self._quiet = output, html, quiet
        self._kind = format_of(Path(output)) if output is not None else None
        for path in (output, html):
            if path is not None:
                Output(Path(path)).discard()
        options = WatchOptions(index=optimizer_index, time_budget=time_budget, command="pybatch.watch()")
        self._watching = Watching(options, say=self._say, on_partial=self._write if output is not None else None)

    def __enter__(self) -> Self:
        self._watching.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        notes = () if kind is None else (Note("run", f"cut: the training ended by {kind.__name__}"),)
        measure = (kind is None or issubclass(kind, KeyboardInterrupt)) and self._watching.options.time_budget > 0
        if measure and kind is not None and self._watching.rank == 0 and self._watching.watches:
            self._say(waiting_for(self._watching.options.time_budget))
        with ProgressLine(Console(stderr=True), self._quiet or not looked_at()) as line:
            self._watching.progress = line
            self.run = self._watching.finish(*notes, measure=measure)
        if self.run is None:
            self._say(unwritten(self._watching.problem, self._output, self._html))
            return
        if not self._quiet and kind is None and self._watching.rank == 0:
            print_run(self.run, Console(stderr=True), more=self._notes)
        if self._output is not None:
            self._write(self.run)
        if self._html is not None:
            write_report([self.run], self._html)

    @property
    def _notes(self) -> str:
        """Where the notes are that are not printed."""
        kept = self._html or (self._output if self._kind == "json" else None)
        return notes_in(Path(kept)) if kept is not None else "pybatch.write_report(watched.run, 'page.html')"

    def _say(self, text: str) -> None:
        if not self._quiet:
            print(f"pybatch: {visible(text)}", file=sys.stderr)

    def _write(self, run: Run) -> None:
        if self._watching.rank == 0:
            with Output(Path(str(self._output))) as file:
                file.write(render(run, self._kind or "json"))
