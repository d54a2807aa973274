"""What a workload is, and where pybatch finds the ones that ship.

A workload says what to train: a model, how to draw a batch, and a loss. It knows nothing of timing, devices, printing.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeVar

import torch

from pybatch.base.errors import UsageError, unknown
from pybatch.workloads.running.choice import OptimizerChoice

Split = Literal["train", "test"]


class Workload(ABC):
    """A training problem of the user's own. Subclass it with `model`, `batch` and `loss`; the rest has defaults.

    Class attributes a subclass may set:
        name: what the record calls it.
        unit: what one example is ("images", "sequences").
        target: what to reach, for steps to target: losses of splits, and metrics of them by name, {"train": 0.3,
            "test:accuracy": 0.95}.
        better: which way each metric that a target names goes: {"accuracy": "higher", "error": "lower"}.
        learning_rate: rate of the warm-up training, with pybatch's AdamW; `reference_batch` is its batch size. Where
            `optimizer` is given, its own rate counts.
        steps: of a whole training at the reference batch, for which `schedule` is made outside a sweep.
        examples: size of the training set, or None where it is unlimited or unknown.
        swept_by: name of the optimizer that sweeps train with where none is asked for and `optimizer` gives none.
        evaluation_examples: size of the fixed batch of each split on which sweeps and branches take losses, often. Give
            as many as make its loss known within some 2 %: 512 digits, or 64 sequences of 64 tokens.
        weight_unit: what `example_weights` counts.
        models: names accepted as `Workload(model=...)`, the default first; empty when there is one model only.
        dials: keyword arguments of the constructor beside `model` and `data`, with what each does; values are int,
            float or str, as annotated.
        sizes: what `--size NAME` stands for: arguments of the constructor, `model` among them, by name.

    Instance attributes a subclass may set, for the record: `model_name`; `options`, the values of its dials; `data`,
    the path of the user's file or folder.
    """

    name: str = "workload"
    unit: str = "examples"
    target: dict[str, float] = {}  # noqa: RUF012 - subclasses write a plain class attribute
    better: Mapping[str, Literal["higher", "lower"]] = MappingProxyType({})
    learning_rate: float = 1e-3
    reference_batch: int = 32
    steps: int = 5000
    examples: int | None = None
    swept_by: str = "sgd"
    evaluation_examples: int = 512
    weight_unit: str = "tokens"
    model_name: str | None = None
    data: str | None = None
    options: Mapping[str, int | float | str] = MappingProxyType({})
    defined_in: str | None = None  # set by pybatch: the module of the user's file that made it
    asked_optimizer: OptimizerChoice | None = None  # set by pybatch: what a user asks for before the workload's own
    models: ClassVar[tuple[str, ...]] = ()
    dials: ClassVar[Mapping[str, str]] = MappingProxyType({})
    sizes: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({})

    @abstractmethod
    def model(self) -> torch.nn.Module:
        """A freshly initialized model on the CPU, drawn from torch's global generator (pybatch seeds it)."""

    @abstractmethod
    def batch(self, n: int, generator: torch.Generator, split: Split = "train") -> Any:
        """Draw n examples with `generator` (on the CPU): any nested structure of CPU tensors, n along dimension 0.

        The workloads that ship draw uniformly with replacement, so n may exceed the data set.
        """

    def timed_batch(self, n: int, generator: torch.Generator) -> Any:
        """A training batch of n examples whose step is timed, and whose values count for nothing; as `batch`.

        For data that are slow to read: capacity asks for the largest batch that fits, where examples may repeat.
        """
        return self.batch(n, generator)

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """Scalar loss: the mean over the examples of the batch, or over all its tokens: see `example_weights`."""

    def example_weights(self, batch: Any) -> torch.Tensor | None:
        """How many of `weight_unit` each example of a batch on the CPU counts for in the loss, [n]; None: all alike.

        For a loss that is a mean over all tokens of the batch, the tokens of each example; with sequences of unequal
        length such as `(batch["labels"] != -100).sum(1)`. The noise scale then weighs micro-batches by it.
        """
        return None

    def optimizer(self, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer | None:
        """The optimizer of a training, with its rate at `reference_batch`; None: pybatch's AdamW at `learning_rate`.

        Any optimizer that steps without a closure, over groups of these parameters as you like: rules and searches of
        rates scale all groups alike. Its states count in time and memory.
        """
        return None

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler | None:
        """The schedule of a training of so many steps: warm-up, cosine, ...; stepped after every update. None: none.

        In a sweep each trial is a whole training of its own length, the shortest that reaches the target: an anneal is
        part of what steps to target mean.
        """
        return None

    def loader(self, n: int, workers: int | None = None) -> Any:
        """A torch DataLoader over training batches of n examples, without an end; None: the workload has none.

        Its rate is measured alone and with the step. `workers`: processes; None: as many as the training has.
        """
        return None

    @classmethod
    def from_parts(
        cls,
        *,
        model: torch.nn.Module | Callable[[], torch.nn.Module],
        train: Any,
        test: Any = None,
        loss: Callable[..., torch.Tensor],
        collate_fn: Callable[[list[Any]], Any] | None = None,
        optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer] | None = None,
        schedule: Callable[[torch.optim.Optimizer, int], Any] | None = None,
        num_workers: int = 0,
        **more: Any,
    ) -> Workload:
        """A workload of what a training has already.

        Args:
            model: a function that makes one, or a module, copied at once: every seed starts from its weights now.
            train: a data set with `__len__` and `__getitem__`; its examples are drawn with replacement.
            test: likewise, held out; sweeps and branches need it.
            loss: of (model, batch); or a criterion of (output, target), such as `torch.nn.CrossEntropyLoss()`, for
                batches that are pairs (input, target). The names of its arguments say which; else modules and what
                torch has are criteria.
            collate_fn: of a list of examples; None: torch's `default_collate`.
            optimizer: of the model's parameters, see `optimizer`; None: pybatch's AdamW at `learning_rate`.
            schedule: of (optimizer, steps), see `schedule`.
            num_workers: of the training's DataLoader, whose rate is measured.
            more: `example_weights`, `metrics` and `better`, see there; `loader_options` (further arguments of the
                DataLoader), and `name`, `unit`, `target`, `learning_rate`, `reference_batch`, `evaluation_examples`,
                `steps`, as of a class.

        Raises:
            UsageError: a data set without indices or without examples, a DataLoader in its place, or another part that
                cannot be used.
        """
        # By name: it is made of this class, and no room has a circle of imports.
        parts = importlib.import_module("pybatch.workloads.parts").Parts
        importlib.import_module("pybatch.workloads.given").check_names(more, parts)
        made: Workload = parts(
            model=model,
            train=train,
            test=test,
            loss=loss,
            collate_fn=collate_fn,
            optimizer=optimizer,
            schedule=schedule,
            num_workers=num_workers,
            **more,
        )
        return made

    def source(self) -> str | None:
        """Hash of what it was made of, where that is not the file of its class; None: nothing else."""
        return None

    def metrics(self, model: torch.nn.Module, batch: Any) -> dict[str, float]:
        """Figures of a batch beside its loss, such as {"accuracy": 0.93}, by a model in evaluation mode.

        A target may name them, with its split: `target={"test:accuracy": 0.95}`; `better` says which way they go.
        """
        return {}

    def brings(self, method: str) -> bool:
        """Whether a method that has a default is the workload's own."""
        return getattr(type(self), method) is not getattr(Workload, method)


def chosen_model(name: str, model: str | None, models: tuple[str, ...]) -> str:
    """The model asked for of a workload, its first if none; raises UsageError for an unknown one."""
    if model is not None and model not in models:
        raise unknown(f"workload {name!r}: model", model, models)
    return model or models[0]


def check_dial(name: str, dial: str, value: float, low: float, high: float, what: str) -> None:
    """Raise UsageError for a dial's value outside low..high; `what` says what is wanted."""
    if not low <= value <= high:
        raise UsageError(f"workload {name!r}: {dial}={value:g} is out of range. Give {what}.")


W = TypeVar("W", bound=type[Workload])

_registry: dict[str, type[Workload]] = {}


def register(workload: W) -> W:
    """Class decorator: make a shipped workload known under its `name`."""
    _registry[workload.name] = workload
    return workload


def registered() -> dict[str, type[Workload]]:
    """The shipped workloads by name."""
    return dict(_registry)


Progress = Callable[[str, float], None]  # what is being done, share done in 0..1


def checked(workload: object) -> None:
    """UsageError for what is no workload: a class, a name, a module."""
    if isinstance(workload, Workload):
        return
    own = "subclass pybatch.Workload with model, batch and loss, and give an instance of it"
    if isinstance(workload, type) and issubclass(workload, Workload):
        raise UsageError(f"workload {workload.__name__} is a class. Give an instance: {workload.__name__}().")
    if isinstance(workload, str):
        raise UsageError(f"workload {workload!r} is a name, as the command line takes it. Give the object, or {own}.")
    what = "torch module" if isinstance(workload, torch.nn.Module) else type(workload).__name__
    raise UsageError(f"workload is a {what}, not a Workload: {own}.")
