"""A workload made of what a training has already: a model, a data set, a loss, an optimizer."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, default_collate

from pybatch.base.errors import UsageError
from pybatch.workloads.base import Split, Workload

Model = torch.nn.Module | Callable[[], torch.nn.Module]
_DISTINCT = 2048  # examples of a batch: of a larger one, whose time alone matters, they repeat
_ENDLESS = 2**31  # draws of a loader


class Parts(Workload):
    """What `Workload.from_parts` makes."""

    def __init__(
        self,
        *,
        model: Model,
        train: Any,
        test: Any = None,
        loss: Callable[..., torch.Tensor],
        collate_fn: Callable[[list[Any]], Any] | None = None,
        optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer] | None = None,
        schedule: Callable[[torch.optim.Optimizer, int], Any] | None = None,
        num_workers: int = 0,
        example_weights: Callable[[Any], torch.Tensor | None] | None = None,
        metrics: Callable[[torch.nn.Module, Any], dict[str, float]] | None = None,
        better: Mapping[str, Literal["higher", "lower"]] | None = None,
        loader_options: Mapping[str, Any] | None = None,
        name: str | None = None,
        unit: str = "examples",
        target: Mapping[str, float] | None = None,
        learning_rate: float | None = None,
        reference_batch: int | None = None,
        evaluation_examples: int | None = None,
        steps: int | None = None,
    ) -> None:
        if not callable(model):
            raise UsageError(f"model is a {type(model).__name__}. Give a function that makes it, or the module.")
        for which, data in (("train", train), ("test", test)):
            if data is not None or which == "train":
                _check_data(which, data)
        if not callable(loss):
            raise UsageError(f"loss is a {type(loss).__name__}. Give a function of (model, batch), or a criterion.")
        if not isinstance(num_workers, int) or num_workers < 0:
            raise UsageError(f"num_workers {num_workers!r}: give the number of processes that load, 0 or more.")
        self._model, self._data, self._loss = model, {"train": train, "test": test}, loss
        self._collate = collate_fn or default_collate
        self._optimizer, self._schedule, self._weights = optimizer, schedule, example_weights
        self._metrics = metrics
        self.num_workers, self._loading = num_workers, dict(loader_options or {})
        own: dict[str, Any] = {
            "name": name or (type(train).__name__.lower()),
            "unit": unit,
            "target": dict(target or {}),
            "better": dict(better or {}),
            "learning_rate": learning_rate,
            "reference_batch": reference_batch,
            "evaluation_examples": evaluation_examples or min(Workload.evaluation_examples, len(train)),
            "steps": steps,
            "examples": len(train),
        }
        for key, value in own.items():
            if value is not None:
                setattr(self, key, value)

    def model(self) -> torch.nn.Module:
        """A fresh model; of a module that was given, a copy."""
        return copy.deepcopy(self._model) if isinstance(self._model, torch.nn.Module) else self._model()

    def batch(self, n: int, generator: torch.Generator, split: Split = "train") -> Any:
        """Draw n examples with replacement, and collate them. Above 2048 (or a reference or evaluation batch) their
        tensors repeat examples: a batch so large is there for its time."""
        data = self._data[split]
        if data is None:
            raise UsageError(f"workload {self.name!r} was made without test data. Give from_parts(test=...).")
        fetched = min(n, max(_DISTINCT, self.reference_batch, self.evaluation_examples))
        index = torch.randint(len(data), (fetched,), generator=generator).tolist()
        with torch.random.fork_rng(devices=[]):  # augmentations draw from it, for one seed the same
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            several = getattr(data, "__getitems__", None)  # as torch's own loaders ask
            made = self._collate(several(index) if several is not None else [data[i] for i in index])
        if fetched == n:
            return made
        again = torch.arange(n) % fetched
        return tree_map(lambda leaf: leaf[again] if _along(leaf, fetched) else leaf, made)

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """As given; a criterion of (output, target) for batches that are pairs (input, target)."""
        if not _is_criterion(self._loss):
            return self._loss(model, batch)
        if not (isinstance(batch, list | tuple) and len(batch) == 2):
            raise UsageError(
                f"loss {_called(self._loss)} is a criterion of (output, target), and the batches are no pairs (input, "
                "target). Give a function of (model, batch)."
            )
        inputs, target = batch
        return self._loss(model(inputs), target)

    def optimizer(self, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer | None:
        """As given."""
        return self._optimizer(params) if self._optimizer is not None else None

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> Any:
        """As given."""
        return self._schedule(optimizer, steps) if self._schedule is not None else None

    def example_weights(self, batch: Any) -> torch.Tensor | None:
        """As given."""
        return self._weights(batch) if self._weights is not None else None

    def metrics(self, model: torch.nn.Module, batch: Any) -> dict[str, float]:
        """As given."""
        return self._metrics(model, batch) if self._metrics is not None else {}

    def loader(self, n: int, workers: int | None = None) -> DataLoader[Any]:
        """Batches of n training examples without an end, by worker processes as the training has them."""
        data = self._data["train"]
        options = self._loading | {"num_workers": self.num_workers if workers is None else workers}
        if not options["num_workers"]:
            for needs in ("prefetch_factor", "persistent_workers", "multiprocessing_context", "timeout"):
                options.pop(needs, None)
        sampler = RandomSampler(data, replacement=True, num_samples=_ENDLESS)
        return DataLoader(data, batch_size=n, sampler=sampler, collate_fn=self._collate, **options)

    def brings(self, method: str) -> bool:
        """As of `Workload`: what was given."""
        given: dict[str, Any] = {
            "optimizer": self._optimizer,
            "schedule": self._schedule,
            "example_weights": self._weights,
            "metrics": self._metrics,
        }
        return given.get(method, self) is not None

    def source(self) -> str:
        """Hash of the functions it is made of."""
        parts = (self._model, self._loss, self._collate, self._optimizer, self._schedule, self._metrics)
        return hashlib.sha256("\n".join(map(_code, parts)).encode()).hexdigest()[:16]


def _check_data(which: str, data: Any) -> None:
    if isinstance(data, DataLoader):
        raise UsageError(
            f"{which} is a DataLoader, whose batch size is fixed. Give its data set ({which}=loader.dataset), its "
            "collate_fn and num_workers."
        )
    if isinstance(data, IterableDataset) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise UsageError(
            f"{which} is a {type(data).__name__} without indices: examples are drawn at random. Give a data set with "
            "__len__ and __getitem__, such as a list of the examples it yields."
        )
    if not len(data):
        raise UsageError(f"{which} has no example. Give a data set that has some.")


def _is_criterion(loss: Callable[..., Any]) -> bool:
    """Whether a loss is one of (output, target): a module, or a function of torch's."""
    return isinstance(loss, torch.nn.Module) or str(getattr(loss, "__module__", "")).split(".")[0] == "torch"


def _along(leaf: Any, n: int) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and len(leaf) == n


def _called(given: Any) -> str:
    return str(getattr(given, "__name__", type(given).__name__))


def _code(given: Any) -> str:
    """What a function does, in text: its source where there is one."""
    if isinstance(given, torch.nn.Module) or given is None:
        return repr(given)
    try:
        return inspect.getsource(given)
    except (OSError, TypeError):
        code = getattr(given, "__code__", None)
        return repr((code.co_code, code.co_consts)) if code is not None else _called(given)
