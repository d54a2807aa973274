"""The fused passes as operators of torch, `torch.ops.pybatch.step` and `.accumulate`: one call for a list of tensors.

For code that is compiled, exported or run on FakeTensors. The optimizers do not go through them: they keep their tables
from step to step, and these operators build one in every call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pybatch import ops
from pybatch.base.errors import UsageError
from pybatch.optim._engine.slots import is_dense

_RULES = {rule.number: name for name, rule in ops.RULES.items()}
_STORAGES = {number: name for name, number in ops.STORAGES.items()}


@torch.library.custom_op(
    "pybatch::step", mutates_args=("params", "states", "masters", "steps", "ledger", "ring", "scalars")
)
def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    masters: Sequence[Tensor],
    steps: Tensor,
    ledger: Tensor,
    ring: Tensor,
    hyper: Tensor,
    rules: Sequence[int],
    rows: Sequence[int],
    storages: Sequence[int],
    max_norm: float | None = None,
    seed: int = 0,
    scalars: Tensor | None = None,
) -> None:
    """One update of a list of tensors, clipped to the global norm `max_norm`.

    Args:
        params: dense tensors on one device.
        grads: of the same shapes and strides.
        states: fp32, those of the first parameter in the order of its rule, then the second's, ...
        masters: one per parameter: fp32 master or int16 remainder where its storage has one, else without elements.
        steps: float32 [params]: updates each has had.
        ledger, ring: `ops.Ledger`'s tensors.
        hyper: float64 [rows, ops.HYPER_COLUMNS], of rows as `ops.RULES[name].row` gives them.
        rules, storages: numbers as in kernels/rules.h and kernels/table.h.
        rows: row of `hyper` of each parameter.
        max_norm: None: not clipped.
        seed: of stochastic rounding.
        scalars: float32 [params]: what the rules keep of each from step to step, `ops.RULES[name].scalar` at first; not
            needed where none does.

    Raises:
        UsageError: tensors that do not belong together, or are not dense.
    """
    if not params:
        return
    _check_lists(params, grads)
    _check_numbers(len(params), len(hyper), rules, rows, storages)
    _check_books(params[0], ledger, ring, hyper)
    if steps.shape != (len(params),) or steps.dtype != torch.float32:
        raise UsageError(f"steps is {steps.dtype} {tuple(steps.shape)}: it must be float32 ({len(params)},).")
    if scalars is None and any(ops.RULES[_RULES[rule]].scalar is not None for rule in rules):
        raise UsageError("scalars is missing: a rule keeps one of each tensor. Give float32 (params,).")
    if scalars is not None and (scalars.shape != (len(params),) or scalars.dtype != torch.float32):
        raise UsageError(f"scalars is {scalars.dtype} {tuple(scalars.shape)}: it must be float32 ({len(params)},).")
    wanted = sum(ops.RULES[_RULES[rule]].states for rule in rules)
    if len(states) != wanted or len(masters) != len(params):
        raise UsageError(
            f"{len(states)} states and {len(masters)} masters for {len(params)} params: these rules need {wanted} "
            f"and {len(params)}."
        )
    left, entries = list(states), []
    for i, (param, master) in enumerate(zip(params, masters, strict=True)):
        name, stored = _RULES[rules[i]], _STORAGES[storages[i]]
        own, left = left[: ops.RULES[name].states], left[ops.RULES[name].states :]
        for state in own:
            _check_beside(param, state, torch.float32, f"a state of tensor {i}")
        kept = master if stored.endswith(("_master", "_remainder")) else None
        if kept is not None:
            dtype = torch.int16 if stored.endswith("_remainder") else torch.float32
            _check_beside(param, kept, dtype, f"the master of tensor {i}")
        if not stored.startswith(str(param.dtype).removeprefix("torch.")):
            raise UsageError(f"tensor {i} is {param.dtype}, its storage {stored!r}. Give the number of one of its own.")
        scalar = None if scalars is None else scalars[i]
        entries.append(ops.Entry(param, tuple(own), name, rows[i], steps[i], stored, kept, salt=i, scalar=scalar))
    backend = ops.choose_backend(None, params[0].device)
    tensors = ops.TensorList(entries, len(hyper), ops.Ledger.of(ledger, ring), backend.chunk)
    tensors.hyper.copy_(hyper)
    _set_gradients(tensors, grads)
    call = ops.Call()
    call.norm = call.clip = max_norm is not None
    call.max_norm = math.inf if max_norm is None else max_norm
    call.inverse, call.seed = 1.0, seed
    backend.step(tensors, call)
    steps.copy_(tensors.steps)
    if scalars is not None:
        scalars.copy_(tensors.scalars)


@torch.library.custom_op("pybatch::accumulate", mutates_args=("sums", "ledger"))
def accumulate(
    sums: Sequence[Tensor], grads: Sequence[Tensor], ledger: Tensor, ring: Tensor, examples: float, weight: float
) -> None:
    """Add `weight` times the gradients, means over `examples`, to fp32 sums, and the squares of both to the ledger.

    Args:
        sums: fp32 tensors on one device.
        grads: of the same shapes and strides.
        ledger, ring: `ops.Ledger`'s tensors.
        examples: of the micro-batch.
        weight: factor of the gradients.

    Raises:
        UsageError: tensors that do not belong together, or are not dense.
    """
    if not sums:
        return
    _check_lists(sums, grads)
    _check_books(sums[0], ledger, ring)
    for i, total in enumerate(sums):
        _check_beside(total, total, torch.float32, f"sum {i}")
    entries = [ops.Entry(total, (), "Sgd", 0, 0.0) for total in sums]
    backend = ops.choose_backend(None, sums[0].device)
    tensors = ops.TensorList(entries, 1, ops.Ledger.of(ledger, ring), backend.chunk)
    _set_gradients(tensors, grads)
    tensors.set("sum", [total.data_ptr() for total in sums])
    call = ops.Call()
    call.examples, call.weight = examples, weight
    backend.accumulate(tensors, call)


# Addresses go to the kernels as they are: what does not fit would be written past its end.


def _check_lists(tensors: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    if len(tensors) != len(grads):
        raise UsageError(f"{len(tensors)} tensors have {len(grads)} gradients: give one each.")
    for i, (tensor, grad) in enumerate(zip(tensors, grads, strict=True)):
        if grad.dtype not in ops.DTYPES or not tensor.device == grad.device == tensors[0].device:
            raise UsageError(
                f"tensor {i} on {tensor.device} has a gradient of {grad.dtype} on {grad.device}: all must be on one "
                f"device, gradients one of {', '.join(map(str, ops.DTYPES))}."
            )
        if not is_dense(tensor) or grad.shape != tensor.shape or grad.stride() != tensor.stride():
            raise UsageError(
                f"tensor {i} of shape {tuple(tensor.shape)} and strides {tensor.stride()} has a gradient of shape "
                f"{tuple(grad.shape)} and strides {grad.stride()}: both must be dense and alike."
            )


def _check_beside(tensor: Tensor, other: Tensor, dtype: torch.dtype, what: str) -> None:
    alike = other.shape == tensor.shape and other.stride() == tensor.stride() and other.device == tensor.device
    if not alike or other.dtype != dtype:
        raise UsageError(
            f"{what} is {other.dtype} {tuple(other.shape)} with strides {other.stride()} on {other.device}: it must be "
            f"{dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}."
        )


def _check_numbers(count: int, groups: int, rules: Sequence[int], rows: Sequence[int], storages: Sequence[int]) -> None:
    for what, numbers, known in (
        ("rules", rules, _RULES),
        ("rows", rows, range(groups)),
        ("storages", storages, _STORAGES),
    ):
        if len(numbers) != count or any(number not in known for number in numbers):
            raise UsageError(f"{what} {list(numbers)}: give {count} numbers, each one of {list(known)}.")


def _check_books(tensor: Tensor, ledger: Tensor, ring: Tensor, hyper: Tensor | None = None) -> None:
    made = ops.Ledger(torch.device("meta"))
    books = [("ledger", ledger, made.values.shape), ("ring", ring, made.ring.shape)]
    if hyper is not None:
        books.append(("hyper", hyper, torch.Size([len(hyper), ops.HYPER_COLUMNS])))
    for name, given, shape in books:
        fits = given.shape == shape and given.dtype == torch.float64 and given.is_contiguous()
        if not fits or given.device != tensor.device:
            raise UsageError(
                f"{name} is {given.dtype} {tuple(given.shape)} on {given.device}: it must be contiguous float64 "
                f"{tuple(shape)} on {tensor.device}, as of ops.Ledger."
            )


def _set_gradients(tensors: ops.TensorList, grads: Sequence[Tensor]) -> None:
    tensors.set("grad", [grad.data_ptr() or 1 for grad in grads])
    tensors.set("grad_type", [ops.DTYPES[grad.dtype] for grad in grads])


@step.register_fake
def _(*_args: object, **_options: object) -> None:
    return None


@accumulate.register_fake
def _(*_args: object, **_options: object) -> None:
    return None
