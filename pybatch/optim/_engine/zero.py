"""Whether `torch.distributed.optim.ZeroRedundancyOptimizer` makes an optimizer: of its own parameters per process."""

from __future__ import annotations

import inspect

from pybatch.base.errors import UsageError

MODULE = "torch.distributed.optim.zero_redundancy_optimizer"
CALLERS = ("_init_local_optimizer", "add_param_group")


def is_caller() -> bool:
    """Whether the optimizer under construction, or the group being added, is ZeRO's.

    Nothing that ZeRO passes says so: it constructs the class from groups as a user does, so the callers are looked at.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name in CALLERS and frame.f_globals.get("__name__") == MODULE:
            return True
        frame = frame.f_back
    return False


def check(max_grad_norm: float | None, noise: bool) -> None:
    """Refuse what needs all gradients: a process of ZeRO gives its optimizer some of them, and norms would be of these.

    Raises:
        UsageError: clipping or noise statistics are asked for.
    """
    if max_grad_norm is not None:
        raise UsageError(
            f"max_grad_norm={max_grad_norm} in ZeroRedundancyOptimizer: each process would clip by the norm of its own "
            "parameters. Leave it out, and call torch.nn.utils.clip_grad_norm_ before step()."
        )
    if noise:
        raise UsageError(
            "noise=True in ZeroRedundancyOptimizer: each process would measure its own parameters. Leave it out, and "
            "call pybatch.noise.attach(model, optimizer)."
        )
