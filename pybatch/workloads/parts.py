"""A workload made of what a training has already: a model, a data set, a loss, an optimizer."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, RandomSampler, default_collate

from pybatch.base.errors import UsageError, WorkloadError
from pybatch.device.generators import place_in_use, seeded
from pybatch.workloads.base import Split, Workload
from pybatch.workloads.given import (
    called,
    check_data,
    check_functions,
    check_loading,
    check_mappings,
    is_torchs,
    kind_of,
    misunderstood,
    own_copy,
)
from pybatch.workloads.running.declared import check

Model = torch.nn.Module | Callable[[], torch.nn.Module]
_DISTINCT = 2048  # examples that are read for a batch whose time alone matters
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
                check_data(which, data)
        if not callable(loss):
            raise UsageError(f"loss is a {type(loss).__name__}. Give a function of (model, batch), or a criterion.")
        check_functions(
            collate_fn=collate_fn,
            optimizer=optimizer,
            schedule=schedule,
            example_weights=example_weights,
            metrics=metrics,
        )
        check_mappings(target=target, better=better, loader_options=loader_options)
        self._kind, self._sure = kind_of(loss)
        self._model = own_copy(model) if isinstance(model, torch.nn.Module) else model
        self._data, self._loss = {"train": train, "test": test}, loss
        self._collate = collate_fn or default_collate
        self._optimizer, self._schedule, self._weights = optimizer, schedule, example_weights
        self._metrics = metrics
        self.num_workers, self._loading = num_workers, dict(loader_options or {})
        own: dict[str, Any] = {
            "name": type(train).__name__.lower() if name is None else name,
            "unit": unit,
            "target": dict(target or {}),
            "better": dict(better or {}),
            "learning_rate": learning_rate,
            "reference_batch": reference_batch,
            "evaluation_examples": evaluation_examples,
            "steps": steps,
            "examples": len(train),
        }
        if evaluation_examples is None:
            own["evaluation_examples"] = min(Workload.evaluation_examples, len(train))
        elif type(evaluation_examples) is not int or evaluation_examples < 1:
            raise UsageError(f"evaluation_examples is {evaluation_examples!r}: give a whole number, at least 1.")
        for key, value in own.items():
            if value is not None:
                setattr(self, key, value)
        try:
            check(self)
        except WorkloadError as error:
            raise UsageError(f"from_parts: {str(error).removeprefix('Parts.')}") from None
        check_loading(num_workers, self._loading, lambda: self.loader(1, max(1, num_workers)))

    def model(self) -> torch.nn.Module:
        """A fresh model; of a module that was given, a copy."""
        return copy.deepcopy(self._model) if isinstance(self._model, torch.nn.Module) else self._model()

    def batch(self, n: int, generator: torch.Generator, split: Split = "train") -> Any:
        """Draw n examples with replacement, and collate them."""
        return self._collated(n, n, generator, split)

    def timed_batch(self, n: int, generator: torch.Generator) -> Any:
        """As `batch`, of 2048 examples at most, which a larger batch repeats: its values count for nothing."""
        return self._collated(n, _DISTINCT, generator, "train")

    def _collated(self, n: int, most: int, generator: torch.Generator, split: Split) -> Any:
        data = self._data[split]
        if data is None:
            raise UsageError(f"workload {self.name!r} was made without test data. Give from_parts(test=...).")
        index = torch.randint(len(data), (min(n, most),), generator=generator).tolist()
        drawn = int(torch.randint(2**31, (), generator=generator))
        with seeded(drawn, place_in_use()):  # augmentations draw from it, for one seed the same
            several = getattr(data, "__getitems__", None)  # as torch's own loaders ask
            rows = several(index) if several is not None else [data[i] for i in index]
            if len(index) < n:
                again = [i % len(index) for i in range(n)]
                if several is not None and not isinstance(rows, list | tuple):  # a data set that makes a batch itself
                    rows = several([index[i] for i in again])
                else:
                    rows = [_own(rows[i]) for i in again]
            return self._collate(rows)

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """As given; a criterion of (output, target) for batches that are pairs (input, target)."""
        if self._sure:
            return self._loss_of(model, batch)
        try:
            return self._loss_of(model, batch)
        except (TypeError, AttributeError) as error:
            raise misunderstood(self._loss, self._kind, error) from error

    def _loss_of(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        if self._kind == "function":
            return self._loss(model, batch)
        if not (isinstance(batch, list | tuple) and len(batch) == 2):
            raise UsageError(
                f"loss {called(self._loss)} is a criterion of (output, target), and the batches are no pairs (input, "
                "target). Give a function of (model, batch)."
            )
        inputs, target = batch
        output = model(inputs)
        try:
            return self._loss(output, target)
        except (TypeError, AttributeError) as error:
            if isinstance(output, torch.Tensor) or not is_torchs(self._loss):
                raise
            raise UsageError(
                f"the model gives {type(output).__name__}, and loss {called(self._loss)} takes a tensor "
                f"({type(error).__name__}: {error}). Give a function of (model, batch) that picks it."
            ) from error

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


def _own(row: Any) -> Any:
    """A row for each time it is collated: collators take keys out of rows."""
    return copy.copy(row) if isinstance(row, MutableMapping | MutableSequence) else row


def _code(given: Any) -> str:
    """What a function does, in text: its source where there is one."""
    if isinstance(given, torch.nn.Module) or given is None:
        return repr(given)
    if isinstance(given, functools.partial):
        return f"{_code(given.func)}{given.args}{sorted(given.keywords.items())}"
    try:
        return inspect.getsource(given)
    except (OSError, TypeError):
        code = getattr(given, "__code__", None)
        return repr((code.co_code, code.co_consts)) if code is not None else called(given)
