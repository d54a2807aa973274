"""What every fused optimizer shares: torch's manners outside, tables of tensors inside."""

from __future__ import annotations

import inspect
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, SupportsFloat, Unpack

import numpy as np
import torch

from pybatch import ops
from pybatch.base.errors import UsageError
from pybatch.base.plain import given
from pybatch.optim._engine import accumulation, amp, states, statistics, zero
from pybatch.optim._engine.accumulation import Sums
from pybatch.optim._engine.arguments import check_count, check_hyper
from pybatch.optim._engine.matrices import Whole
from pybatch.optim._engine.options import Options, OwnOptions, ParamRule, signature
from pybatch.optim._engine.saving import SavedOptimizer
from pybatch.optim._engine.slots import addresses, check_param
from pybatch.optim._engine.tables import Tables
from pybatch.records import NoiseScale

UNMEASURED = (
    "{name}(noise=True).step() without accumulate(n) before it: no noise is measured. Call accumulate(n) after each "
    "backward(), two or more to a step; or, where a trainer calls these, pybatch.noise.attach(model, optimizer)."
)


class FusedOptimizer(SavedOptimizer):
    """A `torch.optim.Optimizer` whose step is one pass over memory; subclasses name the rules and their arguments.

    Args:
        params, defaults: as for torch's base class; parameters may come with names, as `model.named_parameters()`.
        max_grad_norm: clip the gradient to this global L2 norm over all groups, with the formula of
            `torch.nn.utils.clip_grad_norm_`; None: no clipping.
        noise: collect the gradient noise scale from the micro-batches given to `accumulate`.
        master_weights: True: fp32 copies of 16-bit parameters are updated, the parameters are their rounding.
            "remainder": only the 16 bits that bf16 lacks are kept. fp32 parameters are not affected.
        stochastic_rounding: 16-bit parameters without a master are rounded up with a probability equal to the
            distance; an int is the seed.
        state_dtype: "fp32"; "bf16": states are kept in 16 bits, rounded stochastically; "8bit": in 8 bits and a scale
            for each 256 elements (Dettmers et al. 2022); or torch.float32, torch.bfloat16. Rules compute in fp32.
        backend: "cpp", "cuda", "triton"; None: the best one for the parameters' device.
        foreach, fused: accepted for torch's sake and without effect; the pass is always fused.
        differentiable: must be False.

    A step does, in this order: unscale (AMP), verdict on infinities and NaN, noise statistics, clip, decay, update. A
    step with a non-finite gradient changes nothing and counts in `skipped`. The verdict is taken with `max_grad_norm`,
    `noise` or a GradScaler, after `accumulate`, and by LARS, where the gradient is read beforehand anyway; a plain
    optimizer without any of these behaves as torch's, which takes none. `step` and `accumulate` never wait for the
    device.

    Parameters and gradients are fp32, bf16 or fp16 and on one device. Of DTensors the local shards are updated, and
    norms are summed over the mesh. `state_dict` exchanges with the twin in `torch.optim`, key by key, also through
    `torch.distributed.checkpoint`, with states in fp32 whatever `state_dtype` is: they go back to the bits they were
    read from. What only pybatch has travels as states "master", "remainder" and, of the first parameter,
    "noise_statistics", which the twin ignores. An accumulation under way is not saved.

    Master weights follow what others write to a parameter in place (`load_state_dict` of the model, `p.copy_`): where
    the parameter is no longer its master's rounding, the master takes its value. torch does not count writes through
    `p.data`: these are undone by the next step. LARS carries |p| from one step to the next, and after such a write
    takes one step by the old norm. Write under `torch.no_grad()` instead.
    """

    __signature__: ClassVar[inspect.Signature]
    _step_supports_amp_scaling: ClassVar[bool] = True
    batch_rule: ClassVar[str] = "sqrt"  # how its rate follows the batch size: adaptive ones, Malladi et al. 2022
    accumulates = False  # whether `accumulate` was ever called
    warns = True  # at the first step without, where it was to collect noise
    torch_flags: ClassVar[tuple[str, ...]] = ()  # that the twin's groups carry; without effect here
    rule_options: ClassVar[tuple[str, ...]] = ()  # names of the group options that `_rule` reads

    def __init_subclass__(cls) -> None:
        """What asks for the signature, as trainers do for "fused", sees the keywords of `own` too."""
        super().__init_subclass__()
        cls.__signature__ = signature(cls.__init__)

    def __init__(self, params: Any, defaults: dict[str, Any], **own: Unpack[OwnOptions]) -> None:
        if isinstance(params, torch.nn.Module | type):
            name = type(self).__name__
            raise UsageError(f"{name}(): params is {given(params)}. Give its parameters: {name}(model.parameters()).")
        defaults |= {name: own.get(name, False if name == "differentiable" else None) for name in self.torch_flags}
        self._options = Options.given(type(self).__name__, **own)
        if zero.is_caller():
            zero.check(self._options.max_grad_norm, self._options.noise)
        self._reset()
        super().__init__(params, defaults)

    # What a subclass gives.

    @classmethod
    @abstractmethod
    def _check(cls, group: dict[str, Any]) -> None:
        """Raise UsageError where a group's own hyper-parameters are outside their range."""

    @classmethod
    def _rule_key(cls, group: dict[str, Any]) -> tuple[Any, ...]:
        """What `_rule` reads of a group: tables are made anew where it changes."""
        return tuple([group.get(name) for name in cls.rule_options])

    @classmethod
    @abstractmethod
    def _hyper(cls, group: dict[str, Any], rule: ParamRule) -> dict[str, float]:
        """The rule's own hyper-parameters, under its header's names."""

    def _transform(self, staged: list[Whole]) -> None:
        """Between the passes of rules with a second one: change, in place, what the first pass has staged."""
        raise NotImplementedError(f"{type(self).__name__} has a rule with a second pass and nothing between them")

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

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def accumulate(self, n: SupportsFloat) -> None:
        """Take the gradients as the mean over a micro-batch of `n` examples: they are added to a private sum.

        `p.grad` is consumed (None afterwards). `step()` then uses the mean over all examples, sum(n g) / sum(n).
        A CUDA graph can hold it, together with the other micro-batches and the step, where gradients are in the places
        they had in the step before: set `p.grad` to the same tensors, and write to these before each replay.

        Args:
            n: examples (or tokens) of this micro-batch, above 0: a number, or a 0-d tensor on the CPU. The next
                micro-batch may have another number.

        Raises:
            UsageError: `n` is not above 0, or no parameter has a gradient.
        """
        n = check_count(n)
        if not self._add(n, partly=False):
            raise UsageError(f"accumulate({n!r}): no parameter has a gradient. Call loss.backward() before it.")
        self._sums.count(n)
        self.accumulates = True

    def accumulating(self, n: SupportsFloat) -> AbstractContextManager[None]:
        """As `accumulate`, but while backward() runs: `with opt.accumulating(len(x)): loss.backward()`.

        Gradients are added to the sum 64 MiB at a time, so that a second set of them never exists as a whole. An
        exception inside discards the sums of the step. DistributedDataParallel writes gradients once more when its
        all-reduce is done: there it can be used under `no_sync()` only.

        Raises:
            UsageError: `n` is not above 0, a parameter has a gradient already, none gets one, or one gets it twice.
        """
        return self._collect(check_count(n))

    @torch._disable_dynamo  # type: ignore[attr-defined]
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
            amp.forget(self)
            raise
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; an accumulated sum that no step has used is discarded."""
        super().zero_grad(set_to_none)
        if self._sums.under_way:
            self._discard()

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """Global L2 norm of the last step's gradient before clipping: 0-d float64 on the device.

        None before the first step; NaN after a step that took no norm (no clipping, no noise, no accumulation).
        """
        return None if self._ledger is None else self._ledger["norm"]

    @property
    def measures(self) -> bool:
        """Whether it was made with noise=True."""
        return self._options.noise

    @property
    def state_bytes(self) -> int:
        """Bytes that the optimizer keeps for its parameters, or will from the first step on: states, scales, masters.

        Of DTensors those of this process. `state_bytes / sum(p.numel() for p in params)` is bytes per parameter.
        """
        kept = [(self._rule(group, param), param) for group in self.param_groups for param in group["params"]]
        return sum(states.bytes_kept(param, rule, self._options) for rule, param in kept)

    @property
    def skipped(self) -> int:
        """Steps that changed nothing because a gradient was not finite. Reading it waits for the device."""
        return 0 if self._ledger is None else int(self._ledger["skipped"])

    @property
    def noise(self) -> NoiseScale:
        """The gradient noise scale of the newest stretch that gives an interval, with the whole run as trajectory.

        Steps with two or more micro-batches count. Reading it waits for the device. Its `layers` are the scales of the
        single parameters, under their names where the optimizer was given `named_parameters()`, else under their index
        over all groups.

        Raises:
            UsageError: the optimizer was not made with noise=True.
        """
        if not self._options.noise:
            raise UsageError(f"{type(self).__name__} was made without noise=True, so no statistics were kept. Set it.")
        return self._noise()

    @property
    def whole_noise(self) -> NoiseScale:
        """As `noise`, of all steps as one: where they are known to be alike."""
        return self._noise(whole=True)

    # Inside.

    def _noise(self, whole: bool = False) -> NoiseScale:
        names = statistics.names(self.param_groups)
        return statistics.noise(self._ledger, self._layers(), names, self._single_steps, whole=whole)

    def _reset(self, ledger: ops.Ledger | None = None, single_steps: int = 0, seed: int | None = None) -> None:
        self._tables = None
        self._saved_layers = {}
        self._ledger = ledger
        self._sums = Sums()
        self._call, self._follow = ops.Call(), ops.Call()
        self._follow.follow = True
        self._single_steps = single_steps  # steps of one micro-batch, which give no pair of norms
        self._seed = self._options.seed if seed is None else seed
        self._sent_options: list[tuple[Any, ...]] = []

    def _current(self) -> Tables | None:
        """The tables, made anew where a tensor moved, came in or changed its rule; None before the first gradient."""
        options = [self._rule_key(group) for group in self.param_groups]
        tables = self._tables
        if tables is None or options != self._sent_options or not tables.stands(self.param_groups, self.state):
            if tables is not None:
                ops.refuse_capture(tables.first.device, "parameters, states or options have changed")
            self._sent_options = []  # so that a refusal below is met again by the next call
            made = Tables.make(
                self.param_groups, self.state, self._options, self._rule, self._ledger, tables, self._saved_layers
            )
            if made is None:
                return None
            self._sums.tensors = self._sums.moved(tables, made)
            self._ledger, self._tables, self._sent_options = made.ledger, made, options
            tables = made
        tables.send_hyper(self.param_groups, self._hyper)
        return tables

    def _add(self, n: float, *, partly: bool) -> bool:
        """Add the gradients to the sums; whether there were any."""
        tables = self._current()
        found = None if tables is None else tables.gradients()
        if tables is None or found is None or not found.present:
            return False
        accumulation.add(self._sums, tables, found, self._call, n, partly=partly)
        return True

    @contextmanager
    def _collect(self, n: float) -> Iterator[None]:
        found = False

        def flush() -> None:
            nonlocal found
            with torch.no_grad():
                found = self._add(n, partly=True) or found

        params = self._params()
        accumulation.check_empty(params)
        collector = accumulation.Collector(params, flush)
        try:
            yield
            collector.finish()
        except BaseException:
            self._discard()
            raise
        finally:
            collector.remove()
        if not found or self._tables is None:
            raise UsageError(f"accumulating({n!r}): no parameter got a gradient. Call loss.backward() inside.")
        accumulation.close(self._sums, self._tables)
        self._sums.count(n)
        self.accumulates = True

    def _discard(self) -> None:
        self._forget_sums()
        if self._tables is not None:
            self._tables.first.discard()

    def _forget_sums(self) -> None:
        self._sums = self._sums.emptied(0 if self._tables is None else len(self._tables.slots))

    def _update(self) -> None:
        tables, accumulated = self._current(), self._sums.under_way
        if accumulated:
            amp.check_consumed(self, self._params())
        if tables is None:
            return
        found = None if accumulated else tables.gradients()
        if found is None:
            sources = np.array(addresses(self._sums.tensors), dtype=np.int64)
        else:
            sources = found.addresses
            tables.first.set("grad_type", found.codes)
        if not np.count_nonzero(sources):
            return
        call, limit, noise = self._call, self._options.max_grad_norm, self._options.noise
        accumulation.prepare(call, self._sums, limit, noise)
        call.seed = self._follow.seed = self._seed
        self._amp = amp.scalars(self, tables.first.device)  # alive until the next step
        call.grad_scale, call.found_inf = addresses(self._amp)
        apart = found is not None and bool(call.grad_scale) and not amp.in_pass(found)
        call.unscale = found is not None and bool(call.grad_scale) and not apart
        tables.first.set("sum" if accumulated else "grad", sources)
        tables.run(call, self._follow, sources, self._transform, self.param_groups)
        if apart:
            amp.unscale(self._params(), *self._amp)
        if noise and not accumulated and not self.accumulates and self.warns:
            self.warns = False
            warnings.warn(UNMEASURED.format(name=type(self).__name__), stacklevel=7)
        if accumulated and noise and self._sums.micro_batches < 2:
            self._single_steps += 1
        self._forget_sums()
