"""The LSTM of a stack, step by step along its sequences with the matrices of all replicas: `vmap` has no rule for it.

The cells have a backward pass of their own: autograd would keep a graph of some fifteen small operations a step. In it
all that does not wait for the step after is reckoned for all steps at once, which leaves five operations in the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

States = tuple[Tensor, Tensor, Tensor]  # outputs, and the last hidden and cell states, as torch's LSTM has them
GATES = 4  # input, forget, cell, output: torch's order


@dataclass(frozen=True)
class Shape:
    """What an LSTM is beside its weights."""

    biases: bool
    layers: int
    batch_first: bool


def recurrent(
    input: Tensor,
    states: Any,
    weights: Any,
    biases: Any,
    layers: Any = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
) -> tuple[Any, ...] | None:
    """Arguments of `Recurrent`, from those of `torch.lstm`; None for what is left to torch.

    That is a packed sequence, two directions, a projection, and dropout, which `vmap` refuses.
    """
    if not isinstance(biases, bool) or bidirectional or (dropout and train):
        return None
    each = GATES if biases else GATES // 2
    if len(weights) != each * layers or input.dim() != 3:
        return None
    return Shape(biases, layers, batch_first), input, *states, *weights


class Recurrent(torch.autograd.Function):
    """torch's LSTM; `vmap` runs all replicas in one loop over the steps."""

    @staticmethod
    def forward(shape: Shape, input: Tensor, hidden: Tensor, cell: Tensor, *weights: Tensor) -> States:
        found: States = torch.lstm(
            input, [hidden, cell], weights, shape.biases, shape.layers, 0.0, False, False, shape.batch_first
        )
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: without `vmap` there is no gradient here."""

    @staticmethod
    def vmap(info: Any, dims: Any, shape: Shape, *tensors: Tensor) -> tuple[States, tuple[int, int, int]]:
        n = info.batch_size
        stacked = [
            each.expand(n, *each.shape) if dim is None else each.movedim(dim, 0)
            for each, dim in zip(tensors, dims[1:], strict=True)
        ]
        return _layers(shape, stacked[0], stacked[1], stacked[2], stacked[3:]), (0, 0, 0)


def _layers(shape: Shape, input: Tensor, hidden: Tensor, cell: Tensor, weights: Sequence[Tensor]) -> States:
    """As `torch.lstm`, of tensors [replicas, ...]."""
    count, last = len(weights) // shape.layers, []
    below = input.permute(2, 0, 1, 3) if shape.batch_first else input.permute(1, 0, 2, 3)  # [steps, replicas, n, width]
    for layer in range(shape.layers):
        into, within, *biases = weights[count * layer : count * (layer + 1)]
        # All steps at once, for all that comes from below.
        steps, replicas, n, width = below.shape
        flat = below.transpose(0, 1).reshape(replicas, steps * n, width)
        product = flat @ into.mT
        gates = product + (biases[0] + biases[1]).unsqueeze(1) if biases else product
        gates = gates.view(replicas, steps, n, -1).transpose(0, 1)
        own = (each.to(gates.dtype) for each in (hidden[:, layer], cell[:, layer], within))  # under autocast
        below, final = _Cells.apply(gates, *own)  # type: ignore[no-untyped-call]
        last.append((below[-1], final))
    outputs = below.permute(1, 2, 0, 3) if shape.batch_first else below.permute(1, 0, 2, 3)
    return outputs, torch.stack([h for h, _ in last], 1), torch.stack([c for _, c in last], 1)


class _Cells(torch.autograd.Function):
    """One layer: gates [steps, replicas, n, 4 width] without what the step before adds, to outputs [steps, replicas, n,
    width] and the last cell state (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000)."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, hidden: Tensor, cell: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
        steps, width = len(given), hidden.shape[-1]
        gates = torch.empty(given.shape, dtype=given.dtype, device=given.device)
        cells, bent, outputs = (given.new_empty(steps, *hidden.shape) for _ in range(3))
        before, state, back = hidden, cell, within.mT
        for t in range(steps):
            torch.baddbmm(given[t], before, back, out=gates[t])
            gates[t, ..., : 2 * width].sigmoid_()
            gates[t, ..., 2 * width : 3 * width].tanh_()
            gates[t, ..., 3 * width :].sigmoid_()
            enter, keep, new, leave = gates[t].chunk(GATES, -1)
            torch.mul(keep, state, out=cells[t]).addcmul_(enter, new)
            torch.tanh(cells[t], out=bent[t])
            before, state = torch.mul(leave, bent[t], out=outputs[t]), cells[t]
        ctx.save_for_backward(gates, cells, bent, outputs, hidden, cell, within)
        return outputs, cells[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_outputs: Tensor, of_last: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gates, cells, bent, outputs, hidden, cell, within = ctx.saved_tensors
        steps, width = len(gates), hidden.shape[-1]
        enter, keep, new, leave = gates.chunk(GATES, -1)
        before = torch.cat([cell.unsqueeze(0), cells[:-1]])
        # Of the gates by the cell state, of the last gate by the output, and of the cell state by the output.
        by_cell = torch.stack(
            [new * enter * (1 - enter), before * keep * (1 - keep), enter * (1 - new.square())], dim=-2
        )
        by_output, through = bent * leave * (1 - leave), leave * (1 - bent.square())
        found = torch.empty_like(gates)
        parts = found.view(*found.shape[:-1], GATES, width)
        of_cell, of_hidden = of_last.clone(), None
        for t in reversed(range(steps)):
            # The output goes to whoever reads it, and to the gates of the step after.
            total = of_outputs[t] if of_hidden is None else torch.baddbmm(of_outputs[t], of_hidden, within)
            of_cell.addcmul_(total, through[t])
            torch.mul(of_cell.unsqueeze(-2), by_cell[t], out=parts[t, ..., :3, :])
            torch.mul(total, by_output[t], out=parts[t, ..., 3, :])
            of_cell.mul_(keep[t])
            of_hidden = found[t]
        entered = torch.cat([hidden.unsqueeze(0), outputs[:-1]])
        flat, into = (each.transpose(0, 1).flatten(1, 2) for each in (found, entered))
        return found, torch.bmm(found[0], within), of_cell, torch.bmm(flat.mT, into)
