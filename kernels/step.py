"""Triton's launches of a step.

A phase is one launch over the list, and small ones for the sums and the bookkeeping, which CUDA C++ leaves to the block
that finishes last: Triton gives no ordering between the programs of one launch.
"""

from typing import Any

from pybatch.kernels.ledger import collect_kernel, collect_rows_kernel, settle_kernel, settle_rows_kernel
from pybatch.kernels.phases import norm_kernel, step_kernel
from pybatch.kernels.rules import kinds, selection, with_norms, with_scalar
from pybatch.kernels.table import GRAD, LAUNCH, SUM

BLOCK, WARPS = 2048, 8  # elements of a turn of the loops over a chunk, and warps that share them


def _source(call: Any) -> int:
    return int(SUM.value if call.sum else GRAD.value)


def shape(tensors: Any) -> dict[str, int]:
    """How a chunk is gone through: eight elements a thread at a time, of fp32 two vectors."""
    block = min(BLOCK, tensors.table.chunk // 2)
    return {"block": block, "chunk_size": tensors.table.chunk, "num_warps": max(1, min(WARPS, block // 64))}


def _states(tensors: Any, call: Any) -> dict[str, Any]:
    """The arguments that only states and roundings need."""
    return {
        "codes": tensors.scalars if tensors.codes is None else tensors.codes,  # read of 8 bits alone
        "seed_low": call.seed & 0xFFFFFFFF,
        "seed_high": call.seed >> 32,
        "state_type": tensors.table.states,
    }


def _decision(call: Any) -> dict[str, Any]:
    """The arguments of `judge`."""
    return {
        "inverse": call.inverse,
        "max_norm": call.max_norm,
        "grad_scale": call.grad_scale,
        "found_inf": call.found_inf,
        "taken": call.norm or call.known,
        "clip": call.clip,
        "follow": call.follow,
    }


def collect_rows(tensors: Any, source: int, examples: float = 0.0, **how: Any) -> None:
    """Launch `collect_rows_kernel`."""
    how = {"carriers": (), "prepared": (), "gradients": False, "micro": False} | how
    collect_rows_kernel[(tensors.table.row_count,)](
        tensors.rows,
        tensors.starts,
        tensors.share,
        tensors.norms,
        tensors.carried,
        tensors.partials if tensors.layers is None else tensors.layers,
        tensors.partials,
        examples,
        source=source,
        layered=tensors.layers is not None,
        block=64,
        **how,
        **LAUNCH,
    )


def norm(tensors: Any, call: Any) -> None:
    """The norm phase of a `pybatch.ops.TensorList`, where the call needs it."""
    if not call.norm and not (call.known and call.row_norms):
        return
    count, carriers = len(tensors.chunks), with_norms("gradient", tensors.rules)
    if count:
        norm_kernel[(count,)](
            tensors.rows,
            tensors.chunks,
            tensors.partials,
            tensors.carried,
            kinds=kinds(tensors.kinds(accumulated=call.sum)),
            source=_source(call),
            gradients=call.norm,
            **shape(tensors),
            **LAUNCH,
        )
    if call.norm:
        collect(tensors, 0.0, micro=False)
    if call.row_norms:
        collect_rows(tensors, _source(call), carriers=carriers, gradients=call.norm)


def collect(tensors: Any, examples: float, micro: bool) -> None:
    """Launch `collect_kernel`."""
    collect_kernel[(1,)](
        tensors.chunks,
        tensors.share,
        tensors.partials,
        tensors.ledger.values,
        len(tensors.chunks),
        examples,
        micro=micro,
        block=1024,
        **LAUNCH,
    )


def _launch(
    tensors: Any, call: Any, decision: dict[str, Any], only: tuple[int, ...] | None, *, preparing: bool
) -> None:
    """Launch `step_kernel`; only: the numbers of the rules whose tensors it is for; None: all."""
    step_kernel[(len(tensors.chunks),)](
        tensors.rows,
        tensors.chunks,
        tensors.hyper,
        tensors.steps,
        tensors.scalars,
        tensors.norms,
        tensors.partials,
        tensors.ledger.values,
        kinds=kinds(tensors.kinds(only, accumulated=call.sum)),
        source=_source(call),
        preparing=preparing,
        unscale=call.unscale and not preparing,
        **_states(tensors, call),
        **shape(tensors),
        **decision,
        **LAUNCH,
    )


def prepare(tensors: Any, call: Any) -> None:
    """The prepare phase, where the call needs it."""
    prepared = with_norms("direction", tensors.rules)
    if not call.prepare or not len(tensors.chunks):
        return
    _launch(tensors, call, _decision(call), prepared, preparing=True)
    collect_rows(tensors, _source(call), prepared=prepared)


def update(tensors: Any, call: Any) -> None:
    """The update phase and the bookkeeping."""
    decision = _decision(call)
    if len(tensors.chunks):
        _launch(tensors, call, decision, None, preparing=False)
    noise = {"examples": call.examples, "micro_batches": call.micro_batches, "noise": call.noise}
    settle_rows_kernel[(tensors.table.row_count,)](
        tensors.rows,
        tensors.starts,
        tensors.hyper,
        tensors.steps,
        tensors.scalars,
        tensors.carried,
        tensors.partials if tensors.layers is None else tensors.layers,
        tensors.partials,
        tensors.ledger.values,
        source=_source(call),
        carriers=with_norms("gradient", tensors.rules) if call.row_norms else (),
        keepers=selection(with_scalar(tensors.rules)),
        layered=tensors.layers is not None,
        block=64,
        **noise,
        **decision,
        **LAUNCH,
    )
    if not call.follow:
        del decision["follow"]
        settle_kernel[(1,)](tensors.ledger.values, tensors.ledger.ring, **noise, **decision, **LAUNCH)


def step(tensors: Any, call: Any) -> None:
    """One update: all phases."""
    norm(tensors, call)
    prepare(tensors, call)
    update(tensors, call)
