"""Training without a model: planted losses in the place of replicas, and figures of a table in the place of a fit."""

import contextlib
import math

import numpy as np

from pybatch.records import StepsFit


class PlantedReplicas:
    """Losses that fall to 0.02 at a speed of the batch size, the rate and the seed; high rates diverge."""

    def __init__(self, trials):
        self.trials, self.done = list(trials), 0

    def advance(self, steps):
        self.done += steps

    def evaluate(self):
        train = [self._loss(trial) for trial in self.trials]
        return train, [1.1 * loss + 0.02 * (trial.seed % 2) for loss, trial in zip(train, self.trials, strict=True)]

    def keep(self, index):
        self.trials = [self.trials[i] for i in index]

    def _loss(self, trial):
        off = math.log2(trial.lr / (0.02 * math.sqrt(trial.batch)))
        if off > 3:
            return 2.0 * math.exp(min(0.3 * self.done, 50.0))
        noise = np.random.default_rng([trial.batch, trial.seed, round(1e6 * trial.lr)]).normal()
        slow = 8 * (1 + 30 / trial.batch) * (1 + 0.3 * off * off) * math.exp(0.2 * noise)
        warm = 1 + trial.scaled.warmup_steps / 10
        return 0.02 + 1.98 * math.exp(-self.done / (slow * warm))


def planted_fit(batches, steps, *, cap, rates=None):
    """A fit in name: its figures are sums of all that a fit is given, so that nothing of it can differ unseen."""
    given = [np.asarray(x, dtype=float) for x in (batches, steps, cap, rates if rates is not None else 0.0)]
    sums = {f"p{i}": float(np.sum(np.where(np.isfinite(x), x, 0.0))) for i, x in enumerate(given)}
    sums |= {f"q{i}": float(np.sum(~np.isfinite(x))) for i, x in enumerate(given)}
    critical = 1.0 + sums["p1"]
    return StepsFit("hyperbola", 1.0, critical, critical / 2, None, None, critical, None, parameters=sums)


@contextlib.contextmanager
def planted_training(monkeypatch):
    """Within it every trial's losses are planted, and so are fits."""
    with monkeypatch.context() as patch:
        patch.setattr("pybatch.training.task.choose", lambda w, trials, d, how: (PlantedReplicas(trials), None))
        patch.setattr("pybatch.sweep.summary.fit_steps", planted_fit)
        yield
