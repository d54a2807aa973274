"""How a 16-bit parameter is stored: as it is, rounded stochastically, or as the rounding of an fp32 master."""

from __future__ import annotations

from typing import Any

import torch

from pybatch import ops
from pybatch.base.errors import UsageError
from pybatch.optim._engine.options import Options
from pybatch.optim._engine.slots import Slot, fit_state


def storage(slot: Slot, options: Options) -> tuple[str, str | None]:
    """The storage's name in kernels/table.h, and the name of the state that it needs.

    Raises:
        UsageError: a remainder for fp16.
    """
    dtype = str(slot.dtype).removeprefix("torch.")
    if slot.dtype == torch.float32:
        return dtype, None
    if options.master_weights == "remainder":
        if slot.dtype != torch.bfloat16:
            raise UsageError(
                f"master_weights='remainder': {slot.what} is {slot.dtype}, and only bf16 is the upper half of an fp32. "
                "Use master_weights=True."
            )
        return f"{dtype}_remainder", "remainder"
    if options.master_weights:
        return f"{dtype}_master", "master"
    return f"{dtype}_stochastic" if options.stochastic else dtype, None


def fit_master(slot: Slot, name: str, own: dict[str, Any]) -> torch.Tensor:
    """The master or remainder of a parameter: what was saved, in agreement with what the parameter holds now.

    A run that goes on with the other of the two has the same fp32 values.
    """
    saved = own.get(name)
    if name == "remainder":
        if saved is None and (master := own.get("master")) is not None:
            return _remainder(fit_state(slot, "master", master), slot.dense)
        return fit_state(slot, name, saved, torch.int16)
    if saved is None and (remainder := own.get("remainder")) is not None:
        return _joined(slot.dense, fit_state(slot, "remainder", remainder, torch.int16))
    if saved is None:
        return ops.empty_like(slot.dense, torch.float32).copy_(slot.dense)
    master = fit_state(slot, name, saved)
    _follow(master, slot.dense)
    return master


def drop_others(name: str | None, own: dict[str, Any]) -> None:
    """Let go of what is not kept up under this storage: loaded again later it would be believed."""
    for other in ("master", "remainder"):
        if other != name:
            own.pop(other, None)


def _remainder(master: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What `split` in kernels/storage.h leaves below these bf16 values; 0 where others wrote to them."""
    low = master.view(torch.int32).to(torch.int64) - (value.view(torch.int16).to(torch.int64) << 16)
    low = torch.where(master.to(value.dtype) == value, low, 0)
    return low.clamp(-(2**15), 2**15 - 1).to(torch.int16)  # a tie that was rounded to even may miss by one bit


def _joined(value: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The fp32 values, as `join` in kernels/storage.h makes them."""
    return ((value.view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)).view(torch.float32)


def refresh(slot: Slot, name: str, master: torch.Tensor) -> None:
    """Take over what others wrote to a parameter.

    A master keeps the elements whose rounding the parameter still holds. A remainder is set to 0: the upper halves
    are in the parameter itself.
    """
    if name == "remainder":
        master.zero_()
    else:
        _follow(master, slot.dense)


def _follow(master: torch.Tensor, value: torch.Tensor) -> None:
    master.copy_(torch.where(master.to(value.dtype) == value, master, value))
