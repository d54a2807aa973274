"""Hyper-parameters on the device: a row for each group and rule, sent where they changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pybatch import ops
from pybatch.optim._engine.arguments import is_device_scalar
from pybatch.optim._engine.options import ParamRule

Groups = list[dict[str, Any]]
HyperOf = Callable[[dict[str, Any], ParamRule], dict[str, float]]


class HyperRows:
    """The rows of hyper-parameters of one list: one per group and rule."""

    def __init__(self) -> None:
        self.of: dict[tuple[int, ParamRule], int] = {}
        self._sent: list[tuple[float, bool, dict[str, float]]] = []

    def row(self, group: int, rule: ParamRule) -> int:
        """The row of this group and rule, made where there is none."""
        return self.of.setdefault((group, rule), len(self.of))

    def send(self, tensors: ops.TensorList, groups: Groups, hyper_of: HyperOf, maximize: bool) -> None:
        """Bring the list's hyper-parameters up to date; a learning rate on a device is copied there."""
        values = []
        rates: dict[int, Any] = {}
        for row, (number, rule) in enumerate(self.of):
            group = groups[number]
            own = hyper_of(group, rule)
            given = rates[row] = own.pop("lr", group["lr"])  # a rule may have another rate than its group
            lr = math.nan if is_device_scalar(given) else float(given)
            values.append((lr, bool(maximize and group["maximize"]), own))
        if values != self._sent:
            tensors.set_hyper(
                [
                    ops.RULES[rule.name].row(lr, own, maximize=turned)
                    for (_, rule), (lr, turned, own) in zip(self.of, values, strict=True)
                ]
            )
            self._sent = values
        for row, given in rates.items():
            if is_device_scalar(given):
                tensors.hyper[row][0:1].copy_(given.reshape(1), non_blocking=True)
