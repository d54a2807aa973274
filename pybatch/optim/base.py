"""What every fused optimizer shares: torch's manners outside, one table of tensors inside."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, SupportsFloat

import numpy as np
import torch
from torch.optim import Optimizer

from pybatch import ops
from pybatch.errors import UsageError
from pybatch.optim.arguments import check_count, check_hyper, is_device_scalar
from pybatch.optim.slots import EMPTY, Slot, addresses, check_param, conform, fit_state, fit_sum, own_storage
from pybatch.optim.watch import Snapshot
from pybatch.records import NoiseScale


@dataclass(frozen=True)
class Options:
    """pybatch's own arguments of an optimizer."""

    max_grad_norm: float | None
    noise: bool
    backend: str | None


class FusedOptimizer(Optimizer):
    """A `torch.optim.Optimizer` whose step is one pass over memory; subclasses name the rule and its arguments.

    Args:
        params, defaults: as for torch's base class.
        max_grad_norm: clip the gradient to this global L2 norm over all groups, with the formula of
            `torch.nn.utils.clip_grad_norm_`; None: no clipping.
        noise: collect the gradient noise scale from the micro-batches given to `accumulate`; read it as `.noise`.
        backend: "cpp", "cuda", "triton"; None: the best one for the parameters' device.

    A step does, in this order: unscale (AMP), verdict on infinities and NaN, noise statistics, clip, decay, update. A
    step with a non-finite gradient changes nothing and counts in `skipped`. The verdict is taken with `max_grad_norm`,
    `noise` or a GradScaler, and after `accumulate`, where the gradient is read beforehand anyway; a plain optimizer
    without any of these behaves as torch's, which takes none. `step` and `accumulate` never wait for the device.

    Parameters and gradients are fp32, bf16 or fp16 and on one device; states are fp32. `state_dict` exchanges with the
    twin in `torch.optim`; noise statistics travel under the key "pybatch", which the twin ignores. An accumulation
    under way is not saved.
    """

    _step_supports_amp_scaling: ClassVar[bool] = True
    _ledger: ops.Ledger | None

    def __init__(
        self, params: Any, defaults: dict[str, Any], *, max_grad_norm: float | None, noise: bool, backend: str | None
    ) -> None:
        if max_grad_norm is not None and not float(max_grad_norm) > 0.0:
            raise UsageError(f"max_grad_norm {max_grad_norm}: a norm is above 0. Give one, or None not to clip.")
        if backend is not None and backend not in ops.BACKENDS:
            raise UsageError(f"backend {backend!r} is not known. Use one of: {', '.join(ops.BACKENDS)}, or None.")
        self._options = Options(None if max_grad_norm is None else float(max_grad_norm), bool(noise), backend)
        self._reset()
        super().__init__(params, defaults)

    # What a subclass gives.

    @classmethod
    @abstractmethod
    def _check(cls, group: dict[str, Any]) -> None:
        """Raise UsageError where a group's own hyper-parameters are outside their range."""

    @classmethod
    @abstractmethod
    def _rule(cls, group: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        """The rule's name in kernels/rules.h, and torch's names of its states in the rule's order."""

    @classmethod
    @abstractmethod
    def _hyper(cls, group: dict[str, Any]) -> tuple[float, ...]:
        """The rule's own hyper-parameters, in its header's order."""

    # What a user calls.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; refuses what no backend can update (complex, sparse, other dtypes) before anything is written."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_hyper(group, "lr")
            self._check(group)
            first = sum(len(other["params"]) for other in self.param_groups[:-1])
            for index, param in enumerate(group["params"], first):
                check_param(index, param)
        except UsageError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def accumulate(self, n: SupportsFloat) -> None:
        """Take the gradients as the mean over a micro-batch of `n` examples: they are added to a private sum.

        `p.grad` is consumed (None afterwards). `step()` then uses the mean over all examples, sum(n g) / sum(n).

        Args:
            n: examples (or tokens) of this micro-batch, above 0: a number, or a 0-d tensor on the CPU. The next
                micro-batch may have another number.

        Raises:
            UsageError: `n` is not above 0, or no parameter has a gradient.
        """
        n = check_count(n)
        tensors = self._tensors()
        grads = self._gradients()
        if tensors is None or not any(grad is not None for grad in grads):
            raise UsageError(f"accumulate({n!r}): no parameter has a gradient. Call loss.backward() before it.")
        read_from = addresses(self._slots, grads)
        fresh = self._give_sums(grads, read_from)
        if not self._micro_batches:
            self._first = n
        tensors.set("grad", read_from)
        tensors.set("sum", addresses(self._slots, self._sums))
        tensors.set("fresh", fresh)
        call = self._call
        call.weight, call.examples = n / self._first, n
        self._backend.accumulate(tensors, call)
        self._examples += n
        self._micro_batches += 1
        for param in self._listed:
            param.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, or an accumulated sum if `accumulate` was called since the last.

        Args:
            closure: as torch's: evaluates the model again and returns the loss.

        Raises:
            UsageError: a gradient is left that was not accumulated, or is sparse, or of another dtype or device;
                nothing was written then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._update()
        except Exception:
            if hasattr(self, "grad_scale") and hasattr(self, "found_inf"):
                del self.grad_scale, self.found_inf  # a GradScaler's, which removes them only after success
            raise
        return loss

    def _update(self) -> None:
        accumulated = self._micro_batches > 0
        tensors = self._tensors()
        if accumulated:
            self._check_consumed()
            sources = self._sums
        else:
            sources = self._gradients()
        if tensors is None or not any(source is not None for source in sources):
            return
        call = self._prepare_call(accumulated)
        tensors.set("sum" if accumulated else "grad", addresses(self._slots, sources))
        for slot in self._copied:
            slot.dense.copy_(slot.param)
        self._backend.step(tensors, call)
        for slot in self._copied:
            slot.param.copy_(slot.dense)
        # Autograd then refuses a graph that saved the parameters as they were, as after torch's step.
        torch.autograd.graph.increment_version(
            [param for param, source in zip(self._listed, sources, strict=True) if source is not None]
        )
        if accumulated and self._options.noise and self._micro_batches < 2:
            self._single_steps += 1
        self._forget_sums()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; an accumulated sum that no step has used is discarded."""
        super().zero_grad(set_to_none)
        if self._micro_batches:
            self._forget_sums()
            if self._ledger is not None:
                self._ledger.discard()

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """Global L2 norm of the last step's gradient before clipping: 0-d float64 on the device.

        None before the first step; NaN after a step that took no norm (no clipping, no noise, no accumulation).
        """
        return None if self._ledger is None else self._ledger["norm"]

    @property
    def skipped(self) -> int:
        """Steps that changed nothing because a gradient was not finite. Reading it waits for the device."""
        return 0 if self._ledger is None else int(self._ledger["skipped"])

    @property
    def noise(self) -> NoiseScale:
        """The gradient noise scale of all steps so far with two or more micro-batches. Reading it waits for the device.

        Raises:
            UsageError: the optimizer was not made with noise=True.
        """
        if not self._options.noise:
            raise UsageError(f"{type(self).__name__} was made without noise=True, so no statistics were kept. Set it.")
        from pybatch.noise import estimator

        ledger = self._ledger
        pairs = 0.0 if ledger is None else float(ledger["pairs"])
        return estimator.estimate(
            np.zeros((0, 3)) if ledger is None else ledger.ring.cpu().numpy(),
            source="micro-batches",
            small_batch=float(ledger["small_sum"]) / pairs if ledger is not None and pairs else None,
            large_batch=float(ledger["large_sum"]) / pairs if ledger is not None and pairs else None,
            skipped=self.skipped,
            single=self._single_steps,
        )

    # State.

    def state_dict(self) -> dict[str, Any]:
        """As torch's, readable by the twin; noise statistics are under the key "pybatch"."""
        state = super().state_dict()
        if self._ledger is not None:
            state["pybatch"] = self._own_state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; takes the twin's dictionaries too. States keep fp32 where torch would cast them."""
        super().load_state_dict(state_dict)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, param in zip(saved_ids, self._params(), strict=True):
            saved = state_dict["state"].get(i, {})
            if param.dtype != torch.float32:
                for name, value in saved.items():
                    if isinstance(value, torch.Tensor) and name != "step":
                        self.state[param][name] = value.to(param.device, torch.float32)
        self._load_own(state_dict.get("pybatch"))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_options": self._options, "_copied": self._own_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For torch's load_state_dict, copies and pickles alike: addresses are taken anew at the next step."""
        copied = state.pop("_copied", None)
        ledger: ops.Ledger | None = self.__dict__.get("_ledger")
        if ledger is not None:
            ledger.discard()
        self._reset(ledger, self.__dict__.get("_single_steps", 0))
        self._load_own(copied)
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    # Inside.

    def _own_state(self) -> dict[str, Any] | None:
        if self._ledger is None:
            return None
        return self._ledger.state_dict() | {"single_steps": self._single_steps}

    def _load_own(self, saved: dict[str, Any] | None) -> None:
        if saved is not None:
            self._ledger = ops.Ledger(saved["ledger"].device)
            self._ledger.load_state_dict(saved)
            self._single_steps = saved["single_steps"]

    def _reset(self, ledger: ops.Ledger | None = None, single_steps: int = 0) -> None:
        self._backend: ops.Backend
        self._list: ops.TensorList | None = None
        self._ledger = ledger
        self._slots: list[Slot] = []
        self._copied: list[Slot] = []  # whose parameter is not dense: a copy is updated and written back
        self._others: list[torch.Tensor] = []  # parameters without gradient or state so far
        self._rules: list[Any] = []
        self._sent_hyper: list[Any] = []
        self._call = ops.Call()
        self._single_steps = single_steps  # steps of one micro-batch, which give no pair of norms
        self._listed: list[torch.Tensor] = []  # the slots' parameters
        self._snapshot: Snapshot | None = None
        self._sums: list[torch.Tensor | None] = []  # fp32 accumulated gradients, by slot
        self._forget_sums()

    def _forget_sums(self) -> None:
        self._sums = [None] * len(self._slots)
        self._micro_batches, self._examples, self._first = 0, 0.0, 1.0

    def _params(self) -> list[torch.Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _tensors(self) -> ops.TensorList | None:
        """The list, rebuilt where a tensor moved, came in or changed its rule; None before the first gradient."""
        rules = [self._rule(group) for group in self.param_groups]
        if (
            rules != self._rules
            or self._snapshot is None
            or not self._snapshot.stands(self.param_groups, self.state)
            or any(param.grad is not None for param in self._others)
        ):
            self._build(rules)
        if self._list is None:
            return None
        hyper = [self._hyper_row(group) for group in self.param_groups]
        if hyper != self._sent_hyper:
            self._list.set_hyper(hyper)
            self._sent_hyper = hyper
        for row, group in zip(self._list.hyper, self.param_groups, strict=True):
            if is_device_scalar(group["lr"]):
                row[0:1].copy_(group["lr"].reshape(1), non_blocking=True)
        return self._list

    def _hyper_row(self, group: dict[str, Any]) -> tuple[float, ...]:
        lr = math.nan if is_device_scalar(group["lr"]) else float(group["lr"])
        return (lr, float(group["maximize"]), *self._hyper(group))

    def _build(self, rules: list[Any]) -> None:
        self._list = self._snapshot = None  # so that a refusal below is met again by the next call
        known = set(self._listed)
        sums = dict(zip(self._listed, self._sums, strict=True))
        listed: list[tuple[int, int, torch.Tensor]] = []
        others = []
        index = 0
        for number, group in enumerate(self.param_groups):
            for param in group["params"]:
                wanted = param.grad is not None or param in known or bool(self.state.get(param))
                if wanted:
                    check_param(index, param, listed[0][2].device if listed else None)
                    listed.append((index, number, param))
                else:
                    others.append(param)
                index += 1
        backend = ops.choose_backend(self._options.backend, listed[0][2].device) if listed else None
        slots = [Slot.of(index, param) for index, _, param in listed]
        kept = [fit_sum(slot, sums.get(slot.param)) for slot in slots]
        entries = []
        for slot, (_, number, param) in zip(slots, listed, strict=True):
            rule, names = rules[number]
            state = self.state[param] if names else {}
            step = state.get("step", 1.0 if state.get("momentum_buffer") is not None else 0.0)
            for name in names:
                state[name] = fit_state(slot, name, state.get(name))
            entries.append(ops.Entry(slot.dense, tuple(state[name] for name in names), rule, number, step))
        if backend is not None:
            device = listed[0][2].device
            if self._ledger is None:
                self._ledger = ops.Ledger(device)
            self._ledger.to(device)
            self._backend = backend
            self._list = ops.TensorList(entries, len(self.param_groups), self._ledger, backend)
            for step, (_, number, param) in zip(self._list.steps, listed, strict=True):
                if rules[number][1]:
                    self.state[param]["step"] = step
        self._listed = [slot.param for slot in slots]
        self._sums = kept
        self._copied = [slot for slot in slots if slot.copy is not None]
        self._slots, self._others, self._rules, self._sent_hyper = slots, others, rules, []
        self._snapshot = Snapshot(self.param_groups, self.state, self._listed)

    def _gradients(self) -> list[torch.Tensor | None]:
        """The gradients by slot, in the layout of their parameters."""
        grads: list[torch.Tensor | None] = [param.grad for param in self._listed]
        for i, (slot, grad) in enumerate(zip(self._slots, grads, strict=True)):
            if grad is not None and not slot.fits(grad):
                grads[i] = conform(slot, grad)
        return grads

    def _give_sums(self, grads: list[torch.Tensor | None], read_from: list[int]) -> list[int]:
        """A sum for every gradient; 1 where it is new. The first fp32 gradient itself becomes the sum: no copy."""
        given = [place for place in read_from if place > EMPTY]
        reused = set(given).intersection(addresses(self._slots, self._sums))
        if reused:
            slot = self._slots[next(i for i, place in enumerate(read_from) if place in reused)]
            raise UsageError(
                f"accumulate(): the gradient of parameter {slot.index} of shape {tuple(slot.param.shape)} is in the "
                "same memory as one accumulated before, which was consumed. Set p.grad to a clone() of your buffer."
            )
        unshared = len(set(given)) == len(given)
        fresh = [0] * len(grads)
        for i, grad in enumerate(grads):
            if grad is not None and self._sums[i] is None:
                usable = unshared and grad.dtype == torch.float32 and own_storage(grad)
                self._sums[i] = grad if usable else torch.empty_like(self._slots[i].dense, dtype=torch.float32)
                fresh[i] = 1
        return fresh

    def _check_consumed(self) -> None:
        for index, param in enumerate(self._params()):
            if param.grad is not None:
                raise UsageError(
                    f"step() after accumulate(): parameter {index} of shape {tuple(param.shape)} has a gradient that "
                    "was not accumulated. Call accumulate(n) after every backward(), the last one too."
                )
        if isinstance(getattr(self, "found_inf", None), int):
            raise UsageError(
                "GradScaler.step() after accumulate(): the scaler looks for infinities in p.grad, which accumulate() "
                "has consumed. Let .grad accumulate as in torch, or train in bf16 without a scaler."
            )

    def _prepare_call(self, accumulated: bool) -> Any:
        call, noise, limit = self._call, self._options.noise, self._options.max_grad_norm
        call.sum = call.known = accumulated
        call.clip = limit is not None
        call.norm = not accumulated and (limit is not None or noise)
        call.max_norm = math.inf if limit is None else limit
        call.noise = noise and self._micro_batches > 1
        call.inverse = self._first / self._examples if accumulated else 1.0
        call.examples, call.micro_batches = float(self._examples), float(self._micro_batches)
        self._amp = [self._amp_scalar(name) for name in ("grad_scale", "found_inf")]  # alive until the next step
        call.grad_scale, call.found_inf = (0 if scalar is None else scalar.data_ptr() for scalar in self._amp)
        return call

    def _amp_scalar(self, name: str) -> torch.Tensor | None:
        value = getattr(self, name, None)
        if value is None:
            return None
        assert self._list is not None
        return torch.as_tensor(value, dtype=torch.float32, device=self._list.device)
