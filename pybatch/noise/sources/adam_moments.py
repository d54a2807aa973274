"""Noise from Adam's moments: what the optimizer keeps anyway, read every few steps.

With gradients g_t = G + xi_t over B examples, the bias-corrected first moment m is a weighted mean of them, with
kappa, the sum of the squared weights: E|m|^2 = |G|^2 + kappa tr(Sigma) / B. The second moment v averages g^2: its sum
over elements estimates |G|^2 + tr(Sigma) / B. That is a pair of norms over n_small = B and n_large = B / kappa
examples, for the same arithmetic as every other source.

v remembers 1 / (1 - beta2) steps, 1000 by default, and |G|^2 falls in training: a bias toward more noise. Only the
sum of v is needed and it is linear, so two readings k steps apart give the mean of |g|^2 over those k steps alone:
(V_t - beta2^k V_{t-k}) / (1 - beta2^k). What is left is the lag of one window: within it G counts as constant, and
its drift as noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pybatch.base.errors import UsageError
from pybatch.base.numerals import counted, number
from pybatch.noise.handle import Accumulation, Collector, Count, Examples, local_batch, trainable
from pybatch.noise.norms import squares, stored
from pybatch.optim import FusedOptimizer
from pybatch.records import Note

MEMORIES = 3  # windows of so many 1 / (1 - beta1): successive first moments then share exp(-3) = 5 %
MISSING = "no pair of norms: Adam's moments are read every few steps, and there were too few"
LAG = Note(
    "noise.b_simple",
    "from Adam's moments: averages over windows of steps, in which a change of the gradient counts as noise; where the "
    "script clips, they are of clipped gradients and distorted (per-example norms and micro-batches are not)",
)
ALIKE = Note("noise.b_simple", "every process of the DDP model was taken to have as many examples as this one")
CLIPPED = Note("noise.b_simple", "the optimizer clips, so its moments are of clipped gradients: B_simple is distorted")
SAME, EPSILON = 1e-5, 1e-6  # of clipped norms: rounding, as a share; what torch adds to a norm that it divides by
WINDOW = 64  # steps whose norms are compared with the largest of theirs
TIED = 3  # steps of a window with its largest norm, from which it is one that they may have been clipped to


class MomentsNoise(Collector):
    """Pairs from `exp_avg` and `exp_avg_sq` of Adam or AdamW, torch's or pybatch's, every few steps.

    One batch per step is enough: no micro-batches and no hook in the backward pass. Exact in expectation while the
    gradient is constant over a window; lagging and biased to more noise where it changes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        layers: bool = False,
        examples: Examples = None,
        accumulation: Accumulation = "mean",
        unit: str | None = None,
        every: int | None = None,
        notes: tuple[Note, ...] = (),
    ) -> None:
        kind = type(optimizer).__name__
        groups = optimizer.param_groups
        betas = {tuple(map(float, group["betas"])) for group in groups if "betas" in group}
        if [len(pair) for pair in betas] != [2] or any("betas" not in group or "eps" not in group for group in groups):
            has = f"has the betas {sorted(betas)}" if betas else "keeps no two moments"
            raise UsageError(f"source 'adam-moments': {kind} {has}. Use Adam or AdamW with one pair of betas.")
        if isinstance(optimizer, torch.optim.SparseAdam):
            raise UsageError(
                f"source 'adam-moments': {kind} moves the moments of those rows alone that a batch holds, which are no "
                "averages over steps. Use source 'micro-batches'."
            )
        kept = getattr(getattr(optimizer, "_options", None), "state_dtype", "fp32")
        if kept != "fp32":
            raise UsageError(
                f"source 'adam-moments': {kind} keeps its moments as {kept!r}, too coarse for differences of them. Use "
                "state_dtype='fp32', or another source."
            )
        for group in groups:
            if group.get("weight_decay") and not _decoupled(optimizer, group):
                raise UsageError(
                    f"source 'adam-moments': {kind} adds weight_decay {group['weight_decay']} to the gradient before "
                    "its moments. Use AdamW, or another source."
                )
        if any(hasattr(param, "full_tensor") for param in model.parameters()):
            raise UsageError(
                "source 'adam-moments': the parameters, and so the moments, are sharded (DTensor). Use source 'fsdp'."
            )
        self._members = dist.get_world_size(model.process_group) if isinstance(model, DistributedDataParallel) else 1
        self._beta1, self._beta2 = next(iter(betas))
        self._every = math.ceil(MEMORIES / (1.0 - self._beta1)) if every is None else every
        if self._every < 1:
            raise UsageError(f"every {every}: give the steps between readings, 1 or more.")
        named = dict(trainable(model))
        owned = {param for group in groups for param in group["params"]}
        self._params = {name: param for name, param in named.items() if param in owned}
        if not self._params:
            raise UsageError("source 'adam-moments': the optimizer holds no parameter of this model. Pass its own.")
        clips = getattr(getattr(optimizer, "_options", None), "max_grad_norm", None) is not None
        super().__init__(
            "adam-moments",
            model,
            next(iter(self._params.values())).device,
            layers=tuple(self._params) if layers else (),
            unit=unit,
            missing=MISSING,
            notes=(LAG, *((CLIPPED,) if clips else ()), *((ALIKE,) if self._members > 1 else ()), *notes),
            every=self._every,
        )
        self._optimizer, self._accumulation = optimizer, accumulation
        self._given = examples == "count"
        self._counter = Count(model, examples, started=None if self._given else self._began)
        self._zero = torch.zeros((), dtype=torch.float64, device=self._device)
        self._steps = 0  # calls of the optimizer's step in this window
        # Numbers where the optimizer counts its steps on the host, else 0-d on the device, which is not waited for.
        self._taken: Any = 0.0  # of them those that changed the moments,
        self._inverse: Any = 0.0  # sum of 1 / examples,
        self._refused: Any = 0.0  # and those that changed nothing, over all windows
        self._cleared = 0  # micro-batches whose gradients were cleared without a step
        self._norms: list[Sequence[torch.Tensor]] = []  # of the gradients, by parameter, until compared
        self._seen = 0  # steps whose norms were looked at,
        self._tied: Any = self._zero  # of them those that share the largest of their window, 0-d on the device,
        self._top: Any = self._zero  # and the last that was shared
        self._before: tuple[torch.Tensor, Any] | None = None  # sums of v, and the step they are of
        self._looks = not clips
        self._removals = [self._counter.remove, optimizer.register_step_post_hook(self._stepped).remove]
        if any(optimizer.state.get(param) for param in self._params.values()):
            self._before = self._second()
        self._last = self._step()  # of the optimizer, as its state has it

    def count(self, n: float) -> None:
        if self._given:
            self._began()
        super().count(n)

    def _began(self) -> None:
        """A micro-batch begins. Gradients cleared since the one before: a GradScaler left that step out.

        A fused optimizer takes them away in accumulate(), and its step() is called for gradients not finite too.
        """
        assert self._counter is not None
        self._refuse_changed(frozen=True)
        fused = isinstance(self._optimizer, FusedOptimizer)
        if self._counter.pending and not fused and all(p.grad is None for p in self._params.values()):
            self._cleared += self._counter.pending
            self._counter.forget()

    def _step(self) -> Any:
        """Steps that changed the moments: a number, or 0-d float64 on the device."""
        own = (self._optimizer.state.get(param, {}) for param in self._params.values())
        step = next((s["step"] for s in own if "step" in s), 0.0)
        if isinstance(step, torch.Tensor) and step.device.type != "cpu":  # not read, which would wait
            return step.to(torch.float64, copy=True).reshape(())
        return float(step)

    def _wide(self, number: Any) -> torch.Tensor:
        """0-d float64 on the device: 0 / 0 is NaN there."""
        found = isinstance(number, torch.Tensor)
        return number if found else torch.full((), number, dtype=torch.float64, device=self._device)

    def _second(self) -> tuple[torch.Tensor, Any]:
        """(sums of exp_avg_sq [parameters], step), on the device; zeros where a parameter had no step yet."""
        own = [self._optimizer.state.get(param, {}) for param in self._params.values()]
        sums = [s["exp_avg_sq"].sum(dtype=torch.float64) if "exp_avg_sq" in s else self._zero for s in own]
        return torch.stack(sums), self._step()

    def _look(self) -> None:
        """At the norm of the gradients that an update had, which many steps share where the script clips."""
        grads = [stored(p.grad) for p in self._params.values() if p.grad is not None]
        if grads:
            self._norms.append(torch._foreach_norm(grads))
        if len(self._norms) >= WINDOW:
            self._compare()

    def _compare(self) -> None:
        """The norms kept with the largest of them; those of steps that change nothing may not be finite."""
        if not self._norms:
            return
        lengths = torch.tensor([len(norms) for norms in self._norms])  # a layer may have had no gradient in some
        squared = torch.stack([n for norms in self._norms for n in norms]).double().square()
        each = torch.segment_reduce(squared, "sum", lengths=lengths.to(self._device))
        norms = torch.nan_to_num(each, nan=0.0, posinf=0.0).sqrt()
        top = norms.max()
        tied = (norms >= (1.0 - SAME) * top - EPSILON).sum()
        # Norms that torch's epsilon would make alike are not told apart.
        shared = (tied >= TIED) & (top > 100.0 * EPSILON)
        self._tied, self._top = self._tied + torch.where(shared, tied, 0), torch.where(shared, top, self._top)
        self._seen += len(self._norms)
        self._norms = []

    @torch.no_grad()
    def _stepped(self, *_: Any) -> None:
        sizes = self._counter.take() if self._counter is not None else []
        if not sizes:
            raise UsageError(
                "no examples were counted for this step: the model's forward() was not called. "
                "Attach with examples='count' and call handle.count(n) before each backward()."
            )
        if self._looks:
            self._look()
        step = self._step()
        taken = _number(step != self._last)  # 0 where the gradient was not finite and the optimizer changed nothing
        if self._before is not None:
            forward = _number(step >= self._last)  # 0 where an older state was loaded: v since its beginning then
            if isinstance(forward, torch.Tensor) or not forward:
                self._before = self._before[0] * forward, self._before[1] * forward
        self._last = step
        self._taken = self._taken + taken
        self._inverse = self._inverse + taken / local_batch(sizes, self._accumulation)[0]
        self._refused = self._refused + (1.0 - taken)
        self._steps += 1
        if self._steps < self._every:
            return
        first = [
            self._optimizer.state[p]["exp_avg"] for p in self._params.values() if "exp_avg" in self._optimizer.state[p]
        ]
        after, now = self._second()
        before, then = self._before or (torch.zeros_like(after), 0.0)
        if len(first) == len(self._params):
            step, start = self._wide(now), self._wide(then)
            forgotten = self._beta2 ** (step - start)
            small = (after - forgotten * before) / (1.0 - forgotten)  # no step taken: 0 / 0, and the row is skipped
            faded = self._beta1**step
            large = squares(first) / (1.0 - faded) ** 2
            kappa = (1.0 - self._beta1) / (1.0 + self._beta1) * (1.0 + faded) / (1.0 - faded)
            n = self._members * self._wide(self._taken) / self._wide(self._inverse)
            self._row(n, n / kappa, self._arrange(small), self._arrange(large))
        self._compare()
        self._before, self._steps = (after, now), 0
        self._taken, self._inverse = 0.0, 0.0

    def _arrange(self, norms: torch.Tensor) -> torch.Tensor:
        return torch.cat([norms.sum().reshape(1), norms if self._accumulator.layers else norms[:0]])

    def _settle(self) -> None:
        """A reading is a row at once."""

    def _said(self) -> tuple[Note, ...]:
        notes, refused = list(self._notes), round(float(self._refused))
        self._compare()
        tied = round(float(self._tied))
        if tied:
            text = (
                f"{tied} of {counted(self._seen, 'step')} share one norm of their gradients with others, "
                f"{number(float(self._top))} in the last, as where a script clips: B_simple is distorted then, the "
                "more the more are clipped; per-example norms and micro-batches are not"
            )
            notes.append(Note("noise.b_simple", text))
        if refused:
            text = f"in no window: {counted(refused, 'step')} with a gradient that is not finite"
            notes.append(Note("noise.skipped", text))
        if self._cleared:
            text = (
                f"{self._cleared} forward passes had no gradient before the next: where several make one loss, attach "
                "with examples='count'; a GradScaler clears gradients without a step, and they are left out"
            )
            notes.append(Note("noise.skipped", text))
        return tuple(notes)


def _number(true: Any) -> Any:
    """1 or 0, where it was compared."""
    return true.double() if isinstance(true, torch.Tensor) else float(true)


def _decoupled(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether weight decay leaves the moments alone, as in AdamW."""
    return bool(group.get("decoupled_weight_decay")) or "AdamW" in {kind.__name__ for kind in type(optimizer).__mro__}
