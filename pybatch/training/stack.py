"""Trials of one batch size trained as one stacked model.

The forward pass of all replicas goes through `vmap`, all gradients come from one backward pass (the sum of the losses
has each replica's own gradient), and the update has a rate for each. Where there is a choice of how to compute the
same, the first time measures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from pybatch.base.errors import UsageError
from pybatch.device.identity import DTYPES
from pybatch.training.folding import Folding
from pybatch.training.pooling import Pooling
from pybatch.training.replicas import Losses, Replicas
from pybatch.training.trial import Trial
from pybatch.training.updates import Update, update_for
from pybatch.workloads.base import Workload
from pybatch.workloads.running.batches import copied
from pybatch.workloads.running.choice import is_own
from pybatch.workloads.running.session import Session

ROUNDING = torch.finfo(torch.float32).eps ** 0.5  # share of a gradient's norm, in fp32


class Stack(Replicas):
    """Replicas as one model with stacked parameters [R, ...]."""

    def __init__(self, workload: Workload, trials: Sequence[Trial], device: torch.device) -> None:
        super().__init__(workload, trials, device)
        group = trials[0].scaled.group
        if any({**t.scaled.group, "lr": 0} != {**group, "lr": 0} or alone(t) for t in trials):
            raise UsageError("a stack takes trials that differ in their rates only, without a gain or clipping")
        self.template = _LossModule(workload, self.sessions[0].model)
        modules = [_LossModule(workload, session.model) for session in self.sessions]
        named = [dict(module.named_parameters()) for module in modules]
        self.params = {key: torch.stack([n[key].detach() for n in named]) for key in named[0]}
        self.trained = [key for key, p in named[0].items() if p.requires_grad]
        for key in self.trained:
            self.params[key].requires_grad_()
        held = [dict(module.named_buffers()) for module in modules]
        self.buffers = {key: torch.stack([b[key] for b in held]) for key in held[0]}
        self.sessions = list(self.streams.values())  # the other models are in the stack now
        self.update: Update = update_for(trials[0].optimizer, group)
        # Whether to fold images, and to evaluate all replicas at once; None: not yet measured.
        self.folded: bool | None = None if device.type == "cpu" else False
        self.together: bool | None = None

    def _made(self, workload: Workload, trials: Sequence[Trial], device: torch.device) -> list[Session]:
        """A session a seed, which its trials share: their models begin equal, and only copies of them are trained."""
        seeds = dict.fromkeys(trial.seed for trial in trials)
        own = {seed: Session(workload, device, trials[0].dtype, seed) for seed in seeds}
        return [own[t.seed] for t in trials]

    def _autocast(self) -> torch.autocast:
        dtype = self.trials[0].dtype
        return torch.autocast(self.device.type, DTYPES[dtype], enabled=dtype != "fp32")

    def _losses(self, batch: Any, along: int | None) -> Tensor:
        """Losses [R] of a batch, which the loss may change: one a replica (`along` 0) or the same for all (None)."""

        def one(params: dict[str, Tensor], buffers: dict[str, Tensor], batch: Any) -> Tensor:
            loss: Tensor = functional_call(self.template, {**params, **buffers}, (batch,))
            return loss

        with self._autocast():
            losses: Tensor = torch.vmap(one, in_dims=(0, 0, along))(self.params, self.buffers, batch)
        return losses

    def _gradients(self, batch: Any, folded: bool) -> tuple[Tensor | None, ...]:
        with Folding(images=folded):
            losses = self._losses(batch, 0)
        trained = [self.params[key] for key in self.trained]
        grads: tuple[Tensor | None, ...] = torch.autograd.grad(losses.sum(), trained, allow_unused=True)
        return grads

    def _folding_pays(self, batch: Any) -> bool:
        """Whether the same gradients come sooner with images folded; without images there is nothing to measure."""
        before = {key: value.clone() for key, value in self.buffers.items()}  # running means count a pass once
        try:
            with Folding() as folding, torch.no_grad():
                self._losses(copied(batch), 0)
            if not folding.used:
                return False
            seconds, found = {True: math.inf, False: math.inf}, {}
            for folded in (False, True, False, True):  # the first of each also prepares
                start = time.perf_counter()
                found[folded] = self._gradients(copied(batch), folded)
                seconds[folded] = min(seconds[folded], time.perf_counter() - start)
            rounding = torch.finfo(DTYPES[self.trials[0].dtype]).eps ** 0.5
            return seconds[True] < seconds[False] and same(found[True], found[False], rounding)
        except RuntimeError:  # an operation that asks for another order of memory
            return False
        finally:
            self.buffers = before

    def advance(self, steps: int) -> None:
        """As `Replicas.advance`."""
        trained = [self.params[key] for key in self.trained]
        order = {seed: i for i, seed in enumerate(self.streams)}
        index = torch.tensor([order[trial.seed] for trial in self.trials], device=self.device)
        for _ in range(steps):
            batches = list(self.draw().values())
            batch = tree_map(lambda *leaves: torch.stack(leaves)[index], *batches)
            if self.folded is None:
                self.folded = self._folding_pays(batch)
            grads = self._gradients(batch, self.folded)
            with torch.no_grad():
                for p, grad in zip(trained, grads, strict=True):
                    p.grad = torch.zeros_like(p) if grad is None else grad
                self.update.step(trained, self.rates())
            self.done += 1

    def gradients(self, index: Sequence[int]) -> list[Tensor | None]:
        """As `Replicas.gradients`."""
        found = (self.params[key].grad for key in self.trained)
        return [grad[list(index)] if grad is not None else None for grad in found]

    @torch.no_grad()
    def evaluate(self) -> Losses:
        """As `Replicas.evaluate`; the first time both ways, after that the faster one."""
        self.template.eval()
        try:
            if self.together is not None:
                return self._evaluate(self.together)
            found, seconds = {}, {True: math.inf, False: math.inf}
            rounds = 2 if self.device.type == "cuda" else 1  # there the first of each also loads its kernels
            for together in (True, False) * rounds:
                start = time.perf_counter()
                found[together] = self._evaluate(together)
                seconds[together] = min(seconds[together], time.perf_counter() - start)
            self.together = seconds[True] <= seconds[False]
            return found[True]
        finally:
            self.template.train()

    def _evaluate(self, together: bool) -> Losses:
        """Losses of all replicas at once, or one by one: stacked convolutions are slow on large batches."""
        if together:
            with Pooling(), Folding(images=False):
                train, test = (self._losses(copied(batch), None).tolist() for batch in self.held_out)
            return train, test
        train, test = [], []
        for r in range(len(self.trials)):
            one = {key: value[r] for key, value in {**self.params, **self.buffers}.items()}
            with self._autocast(), Pooling():
                losses = [functional_call(self.template, one, (copied(batch),)) for batch in self.held_out]
            train.append(float(losses[0]))
            test.append(float(losses[1]))
        return train, test

    def keep(self, index: Sequence[int]) -> None:
        """As `Replicas.keep`."""
        chosen = torch.tensor(index, device=self.device)
        self.trials = [self.trials[i] for i in index]
        self.params = {k: p.detach()[chosen].requires_grad_(p.requires_grad) for k, p in self.params.items()}
        self.buffers = {k: b[chosen] for k, b in self.buffers.items()}
        self.update.keep(chosen)
        wanted = {trial.seed for trial in self.trials}
        self.streams = {seed: session for seed, session in self.streams.items() if seed in wanted}


class _LossModule(nn.Module):
    """A workload's loss as a module, so that the parameters of the model inside can be replaced."""

    def __init__(self, workload: Workload, model: nn.Module) -> None:
        super().__init__()
        self.workload, self.model = workload, model

    def forward(self, batch: Any) -> Tensor:
        """The loss of a batch."""
        return self.workload.loss(self.model, batch)


def same(mine: Sequence[Tensor | None], theirs: Sequence[Tensor | None], rounding: float) -> bool:
    """Whether every replica's gradient, of stacked ones [R, ...], is off by no more than a share of its norm.

    More is no rounding: what is changed in place through a view or `reshape` is not, where that made a copy.
    """
    pairs = [(a, b) for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None]
    off, size = _squares([a - b for a, b in pairs]), _squares([b for _, b in pairs])
    return bool(((off <= rounding**2 * size) | ~size.isfinite()).all())


def _squares(stacked: Sequence[Tensor]) -> Tensor:
    return torch.stack([each.reshape(len(each), -1).double().square().sum(1) for each in stacked]).sum(0)


def alone(trial: Trial) -> bool:
    """Whether an update needs the trial's own gradients or optimizer: a norm over them, which an optimizer over a stack
    mixes; a loss scale; an optimizer of the workload's own."""
    apart = trial.dtype == "fp16" or is_own(trial.optimizer)
    return bool(apart or trial.scaled.gain_batch or trial.scaled.group.get("max_grad_norm"))
