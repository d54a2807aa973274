"""Trials of one batch size trained in step: one by one (`Loop`), or as one stacked model (`Stack`).

Both give each trial the model, the batches and the update it would have alone. A stack runs the forward pass of all
replicas through `vmap`, takes all gradients in one backward pass (the sum of the losses has each replica's own
gradient), and updates with a rate for each. `choose` measures which of the two is faster, and that they agree.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from pybatch.convergence.pooling import Pooling
from pybatch.convergence.trial import Trial
from pybatch.convergence.updates import Update, optimizer_class, update_for
from pybatch.device.identity import DTYPES
from pybatch.errors import UsageError, WorkloadError
from pybatch.scaling import gain
from pybatch.workloads.base import Workload
from pybatch.workloads.session import Session

EVALUATED = 512  # examples of each split's fixed batch: a loss then is known within some 5 %, the same for all trials
EVALUATION_SEED = 2**31 - 1  # of the fixed batches
MEMORY = 2**30  # bytes of parameters, gradients and optimizer states trained at a time
AGREE = 1e-3  # relative: losses of stacked and separate replicas after two steps; fp32 rounding is 1e-6, a fault is 0.1
INTERVAL = 8  # steps between two evaluations in the middle of a trial
SAMPLE = 4  # replicas by which the loop is timed

Losses = tuple[list[float], list[float]]  # train and test, a number for each replica


class Replicas(ABC):
    """Trials of one batch size, all at the same step."""

    def __init__(self, workload: Workload, trials: Sequence[Trial], device: torch.device) -> None:
        self.trials, self.device = list(trials), device
        self.batch = trials[0].batch
        self.done = 0  # steps
        self.streams: dict[int, Session] = {}
        self.sessions = [Session(workload, device, t.dtype, t.seed) for t in trials]
        for trial, session in zip(trials, self.sessions, strict=True):
            self.streams.setdefault(trial.seed, session)
        held_out = Session(workload, device, trials[0].dtype, EVALUATION_SEED)
        self.held_out = [held_out.batch(EVALUATED, "train"), held_out.batch(EVALUATED, "test")]

    @abstractmethod
    def advance(self, steps: int) -> None:
        """Train every replica for so many steps."""

    @abstractmethod
    def evaluate(self) -> Losses:
        """Losses of the fixed batches, in evaluation mode."""

    @abstractmethod
    def keep(self, index: Sequence[int]) -> None:
        """Go on with these replicas only."""

    def rates(self) -> list[float]:
        """Each replica's rate in the step about to be made."""
        return [trial.scaled.lr(self.done) for trial in self.trials]

    def draw(self) -> dict[int, Any]:
        """The next batch of every seed."""
        return {seed: session.batch(self.batch) for seed, session in self.streams.items()}


class Loop(Replicas):
    """Replicas one after another in every step, with pybatch's own optimizers."""

    def __init__(self, workload: Workload, trials: Sequence[Trial], device: torch.device) -> None:
        super().__init__(workload, trials, device)
        self.optimizers = []
        for trial, session in zip(trials, self.sessions, strict=True):
            self.optimizers.append(optimizer_class(trial.optimizer)(session.parameters, **trial.scaled.group))
        self.gains = [Gain(trial) if trial.scaled.gain_batch else None for trial in trials]

    def advance(self, steps: int) -> None:
        """As `Replicas.advance`."""
        for _ in range(steps):
            batches = self.draw()
            rates = self.rates()
            for i, trial in enumerate(self.trials):
                torch.manual_seed(hash((trial.seed, self.done)) % 2**63)  # dropout: the same whatever ran before
                session, optimizer, measured = self.sessions[i], self.optimizers[i], self.gains[i]
                optimizer.zero_grad()
                factor = 1.0
                if measured is None:
                    session.backward(batches[trial.seed])
                else:
                    factor = measured.backward(session, batches[trial.seed])
                for group in optimizer.param_groups:
                    group["lr"] = rates[i] * factor
                optimizer.step()
            self.done += 1

    def evaluate(self) -> Losses:
        """As `Replicas.evaluate`."""
        with Pooling():
            train, test = ([float(s.evaluate(batch)) for s in self.sessions] for batch in self.held_out)
        return train, test

    def keep(self, index: Sequence[int]) -> None:
        """As `Replicas.keep`."""
        for name in ("trials", "sessions", "optimizers", "gains"):
            setattr(self, name, [getattr(self, name)[i] for i in index])
        wanted = {trial.seed for trial in self.trials}
        self.streams = {seed: session for seed, session in self.streams.items() if seed in wanted}


class Gain:
    """The AdaScale gain of one trial, from the gradients of its batch's parts (Johnson et al. 2020, section 3.3)."""

    def __init__(self, trial: Trial) -> None:
        assert trial.scaled.gain_batch is not None
        self.parts = trial.batch // trial.scaled.gain_batch
        self.decay = max(1 - self.parts / 1000, 0.0)
        self.trace = self.grad_sq = self.weight = 0.0

    def backward(self, session: Session, batch: Any) -> float:
        """Leave the mean gradient in `.grad`; returns the gain."""
        parameters, size = session.parameters, len(_first_tensor(batch)) // self.parts
        total: list[Tensor] = []
        square = 0.0
        for part in range(self.parts):
            cut = slice(part * size, (part + 1) * size)
            session.backward(tree_map(lambda leaf, cut=cut: leaf[cut] if _batched(leaf, batch) else leaf, batch))
            grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
            square += _square(grads)
            total = grads if not total else [a + g for a, g in zip(total, grads, strict=True)]
            for p in parameters:
                p.grad = None
        for p, g in zip(parameters, total, strict=True):
            p.grad = g / self.parts
        mean_sq = _square([g / self.parts for g in total])
        trace = (square - self.parts * mean_sq) / (self.parts - 1)
        if not math.isfinite(trace):
            return 1.0  # training broke down: the next evaluation says so
        # Bias-corrected means: numerator and denominator separately, debiased by the weight they hold.
        self.trace = self.decay * self.trace + (1 - self.decay) * trace
        self.grad_sq = self.decay * self.grad_sq + (1 - self.decay) * (mean_sq - trace / self.parts)
        self.weight = self.decay * self.weight + (1 - self.decay)
        return gain(self.trace / self.weight, self.grad_sq / self.weight, self.parts)


class Stack(Replicas):
    """Replicas as one model with stacked parameters [R, ...]."""

    def __init__(self, workload: Workload, trials: Sequence[Trial], device: torch.device) -> None:
        super().__init__(workload, trials, device)
        group = trials[0].scaled.group
        if any({**t.scaled.group, "lr": 0} != {**group, "lr": 0} or _alone(t) for t in trials):
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
        self.together: bool | None = None  # whether to evaluate all replicas at once; None: not yet measured

    def _autocast(self) -> torch.autocast:
        dtype = self.trials[0].dtype
        return torch.autocast(self.device.type, DTYPES[dtype], enabled=dtype != "fp32")

    def _losses(self, batch: Any, along: int | None) -> Tensor:
        """Losses [R] of a batch: one a replica (`along` 0) or the same for all (None)."""

        def one(params: dict[str, Tensor], buffers: dict[str, Tensor], batch: Any) -> Tensor:
            loss: Tensor = functional_call(self.template, {**params, **buffers}, (batch,))
            return loss

        with self._autocast():
            losses: Tensor = torch.vmap(one, in_dims=(0, 0, along))(self.params, self.buffers, batch)
        return losses

    def advance(self, steps: int) -> None:
        """As `Replicas.advance`."""
        trained = [self.params[key] for key in self.trained]
        order = {seed: i for i, seed in enumerate(self.streams)}
        index = torch.tensor([order[trial.seed] for trial in self.trials], device=self.device)
        for _ in range(steps):
            batches = list(self.draw().values())
            batch = tree_map(lambda *leaves: torch.stack(leaves)[index], *batches)
            losses = self._losses(batch, 0)
            grads = torch.autograd.grad(losses.sum(), trained, allow_unused=True)
            with torch.no_grad():
                for p, grad in zip(trained, grads, strict=True):
                    p.grad = torch.zeros_like(p) if grad is None else grad
                self.update.step(trained, self.rates())
            self.done += 1

    @torch.no_grad()
    def evaluate(self) -> Losses:
        """As `Replicas.evaluate`; the first time both ways, after that the faster one."""
        self.template.eval()
        try:
            if self.together is not None:
                return self._evaluate(self.together)
            found, seconds = {}, {}
            for together in (True, False):
                start = time.perf_counter()
                found[together] = self._evaluate(together)
                seconds[together] = time.perf_counter() - start
            self.together = seconds[True] <= seconds[False]
            return found[True]
        finally:
            self.template.train()

    def _evaluate(self, together: bool) -> Losses:
        """Losses of all replicas at once, or one by one: stacked convolutions are slow on large batches."""
        if together:
            with Pooling():
                train, test = (self._losses(batch, None).tolist() for batch in self.held_out)
            return train, test
        train, test = [], []
        for r in range(len(self.trials)):
            one = {key: value[r] for key, value in {**self.params, **self.buffers}.items()}
            with self._autocast(), Pooling():
                losses = [functional_call(self.template, one, (batch,)) for batch in self.held_out]
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


def choose(
    workload: Workload, trials: Sequence[Trial], device: torch.device, how: Literal["stacked", "loop"] | None = None
) -> tuple[Replicas, str | None]:
    """The faster form for these trials, ready at step 0, and why they are not stacked where they can't be.

    Args:
        workload, trials, device: what is trained, and where.
        how: "stacked" or "loop" to have one of them without measuring.
    """
    if how == "loop" or len(trials) == 1 or any(map(_alone, trials)):
        return Loop(workload, trials, device), None
    if how == "stacked":
        return Stack(workload, trials, device), None
    few = trials[:: max(1, len(trials) // SAMPLE)][:SAMPLE]
    loop, separate = _timed(Loop(workload, few, device))
    try:
        stacked, together = _timed(Stack(workload, trials, device))
    except (torch.OutOfMemoryError, MemoryError):
        return Loop(workload, trials, device), "not stacked: memory ran out"
    except (RuntimeError, NotImplementedError, TypeError, ValueError, WorkloadError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return Loop(workload, trials, device), f"not stacked: the model cannot be run through vmap ({line})"
    places = [trials.index(trial) for trial in few]
    for mine, theirs in zip(loop, stacked, strict=True):
        for j, i in enumerate(places):
            if not _agree(mine[j], theirs[i]):
                text = f"not stacked: losses of stacked and separate replicas differ ({theirs[i]:.6g}, {mine[j]:.6g})"
                return Loop(workload, trials, device), text
    if together <= separate * len(trials) / len(few):
        return Stack(workload, trials, device), None
    return Loop(workload, trials, device), None


def _alone(trial: Trial) -> bool:
    """Whether an update needs a norm over the trial's own gradients, which an optimizer over a stack mixes."""
    return bool(trial.scaled.gain_batch or trial.scaled.group.get("max_grad_norm"))


def chunks(trials: Sequence[Trial], parameter_bytes: int) -> list[list[Trial]]:
    """Trials in groups whose parameters, gradients and states (at most two more copies) fit MEMORY, middle rates first.

    A good rate found early shortens the trials of the groups after it.
    """
    rates = sorted({trial.lr for trial in trials})
    centre = len(rates) // 2
    ordered = sorted(trials, key=lambda t: (abs(rates.index(t.lr) - centre), t.lr, t.seed))
    size = max(1, MEMORY // max(1, 4 * parameter_bytes))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def _timed(replicas: Replicas) -> tuple[Losses, float]:
    """Losses after two steps, and the seconds of INTERVAL steps and an evaluation."""
    replicas.advance(2)
    losses = replicas.evaluate()  # waits for the device, as those below do
    step = evaluation = math.inf
    for _ in range(2):
        begin = time.perf_counter()
        replicas.evaluate()
        middle = time.perf_counter()
        replicas.advance(1)
        replicas.evaluate()
        end = time.perf_counter()
        evaluation = min(evaluation, middle - begin)
        step = min(step, end - middle)
    return losses, INTERVAL * max(0.0, step - evaluation) + evaluation


def _agree(a: float, b: float) -> bool:
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.isfinite(a) == math.isfinite(b)
    return abs(a - b) <= AGREE * max(abs(a), abs(b), 1e-3)


def _square(tensors: list[Tensor]) -> float:
    return float(sum(n.double().square() for n in torch._foreach_norm(tensors)))


def _first_tensor(batch: Any) -> Tensor:
    from torch.utils._pytree import tree_leaves

    return next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim)


def _batched(leaf: Any, batch: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == len(_first_tensor(batch))
