"""A small sweep whose steps are known."""

import torch
from torch import nn

from pybatch.sweep.measurement import measure_convergence
from pybatch.workloads.base import Workload

D = 15


class Isotropic(Workload):
    """Noiseless regression on N(0, I): B_simple = d + 1 = 16 at every point of training, and closed-form steps."""

    name = "isotropic"
    target = {"train": 0.1}  # noqa: RUF012
    examples = 100

    def model(self):
        made = nn.Linear(D, 1, bias=False)
        nn.init.zeros_(made.weight)
        return made

    def batch(self, n, generator, split="train"):
        x = torch.randn(n, D, generator=generator)
        return x, 0.5 * x.sum(1, keepdim=True)

    def loss(self, model, batch):
        x, y = batch
        return nn.functional.mse_loss(model(x), y) / 2


ARGUMENTS = {"device": "cpu", "seeds": 3, "rates": [0.05, 0.1, 0.2, 0.4, 0.8], "max_steps": 400}


def measure(workload=None, batches=(4, 8, 16, 32), **changes):
    return measure_convergence(workload or Isotropic(), list(batches), **(ARGUMENTS | changes))
