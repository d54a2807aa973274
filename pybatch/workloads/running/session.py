"""A workload put on a device: its model, its stream of batches, and checked calls to the user's three methods."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from pybatch.base.errors import DeviceError, UsageError, WorkloadError
from pybatch.base.numerals import counted, memory
from pybatch.device.abilities import refused_layer
from pybatch.device.generators import forked, place_in_use, seed_all
from pybatch.device.identity import DTYPES, cpu_name
from pybatch.device.memory import upload
from pybatch.records import WorkloadInfo
from pybatch.workloads.base import Split, Workload
from pybatch.workloads.running import optimizers
from pybatch.workloads.running.batches import copied
from pybatch.workloads.running.calls import called, told
from pybatch.workloads.running.choice import is_own
from pybatch.workloads.running.compiling import compiled
from pybatch.workloads.running.declared import check
from pybatch.workloads.running.finding import file_digest
from pybatch.workloads.running.loss_scale import LossScale
from pybatch.workloads.running.sharing import Lookout

EVALUATION_SEED = 2**31 - 1  # of the fixed batches; no training has it


def checked_dtype(name: str) -> torch.dtype:
    """The dtype of this name, for autocast and ceilings; raises UsageError for another."""
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r} is not known. Use one of: {', '.join(DTYPES)}.")
    return DTYPES[name]


class Session:
    """One model of a workload on one device, in training mode.

    Args:
        workload: what to run.
        device: where; parameters and batches are moved there.
        dtype: "fp32", or "bf16" or "fp16" for autocast over fp32 parameters; in fp16 losses are scaled.
        seed: of the model's initialization and of the stream of batches.

    Every failure of a method of the workload is raised as `WorkloadError` that names the method; running out of
    memory is passed on unchanged, because it is a measurement and not a fault. A model that cannot be moved to the
    device, or not be trained there in this dtype, is a `DeviceError`.
    """

    def __init__(self, workload: Workload, device: torch.device, dtype: str = "fp32", seed: int = 0) -> None:
        checked_dtype(dtype)
        check(workload)
        self.workload, self.device, self.dtype = workload, device, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self._lookout = Lookout()
        with forked(place_in_use()):
            seed_all(seed)
            model = self._call("model")
        if not isinstance(model, torch.nn.Module):
            raise self._error("model", f"returned {type(model).__name__}, not a torch.nn.Module")
        self._check_dtype(model)
        self.model = self._placed(model).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not self.parameters:
            raise self._error("model", "returned a model without a parameter to train")
        self._runs = self.model  # what the losses of training go through
        self.scaling = LossScale() if dtype == "fp16" else None
        if self.scaling is not None:
            for p in self.parameters:  # before a gradient is added to others, reduced, or seen by other hooks
                p.register_hook(lambda grad: grad / self.loss_scale)  # type: ignore[no-untyped-call]
        self._optimizer: tuple[str, dict[str, str], float] | None = None  # as the record names it

    def _placed(self, model: torch.nn.Module) -> torch.nn.Module:
        tensors = [*model.parameters(), *model.buffers()]
        size = sum(t.numel() * t.element_size() for t in tensors)
        what = f"the model of workload {self.workload.name!r} ({memory(size)})"
        try:
            return model.to(self.device)
        except Exception as error:
            cause = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
            if is_out_of_memory(error):
                raise DeviceError(
                    f"{what} does not fit on {self.device}, out of memory: {cause}. Take a smaller model, end what "
                    "else uses the device, or name another one."
                ) from error
            raise DeviceError(
                f"{what} cannot be moved to {self.device}: {cause}. Name another device, or see 'pybatch doctor'."
            ) from error

    def _check_dtype(self, model: torch.nn.Module) -> None:
        """Ask the processor first: in the middle of a run, oneDNN's own words name neither it nor a remedy."""
        if self.device.type != "cpu" or self.dtype == "fp32":
            return
        if (refused := refused_layer(model, DTYPES[self.dtype])) is not None:
            layer, why = refused
            processor = f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"
            raise DeviceError(
                f"the model of workload {self.workload.name!r} has a layer of type {layer}, which torch does not run "
                f"in {self.dtype} on this processor ({processor}): {why}. Take --dtype fp32 (dtype='fp32'), another "
                "model, or a GPU."
            )

    def compile(self) -> None:
        """Have torch.compile compile the model for training, for each batch size anew; evaluation stays eager."""
        self._runs = compiled(self.model)

    @property
    def compiled(self) -> bool:
        """Whether the next loss goes through torch.compile."""
        return self._runs is not self.model

    @contextmanager
    def as_written(self) -> Iterator[None]:
        """In this context a compiled model runs eagerly, so that its operators can be counted."""
        before, self._runs = self._runs, self.model
        try:
            yield
        finally:
            self._runs = before

    @property
    def info(self) -> WorkloadInfo:
        """The workload as the record names it."""
        work = self.workload
        if self._optimizer is None:
            self._optimizer = optimizers.described(work, self.parameters, self._call)
        name, options, rate = self._optimizer
        return WorkloadInfo(
            name=work.name,
            unit=work.unit,
            parameters=sum(p.numel() for p in self.parameters),
            dtype=self.dtype,
            model=work.model_name,
            examples=work.examples,
            learning_rate=rate,
            reference_batch=work.reference_batch,
            target=dict(work.target),
            options=dict(work.options),
            file_sha256=file_digest(work),
            optimizer=name,
            optimizer_options=options,
        )

    def optimizer(self, *, still: bool = False, capturable: bool = False) -> torch.optim.Optimizer:
        """What the model is trained with, see `optimizers.make`."""
        return optimizers.make(self.workload, self.parameters, self._call, still=still, capturable=capturable)

    def own_optimizer(self) -> torch.optim.Optimizer:
        """The workload's own; raises UsageError where it has none."""
        found = optimizers.own(self.workload, self.parameters, self._call)
        if found is None:
            raise UsageError(
                f"optimizer 'own': workload {self.workload.name!r} has none. Name one, such as 'adamw', or define its "
                "optimizer()."
            )
        return found

    def optimizer_of(self, name: str, group: Mapping[str, Any]) -> torch.optim.Optimizer:
        """One of pybatch's by name, or the workload's own, with the hyper-parameters of a group, rate among them."""
        if is_own(name):
            return optimizers.of_group(self.own_optimizer(), group)
        return optimizers.named(name, self.parameters, group)

    @property
    def loss_scale(self) -> float:
        """By which losses are multiplied: 1 but in fp16."""
        return 1.0 if self.scaling is None else self.scaling.value

    def update(self, optimizer: torch.optim.Optimizer) -> bool:
        """One update; left out where fp16 gradients overflowed, after which the loss is scaled by half as much.

        As torch's GradScaler does it, down to a least scale. After 50 in a row that were left out the training has
        diverged: `evaluate` gives NaN, and `check_finite` raises. Only fp16 waits for the device.
        """
        if self.scaling is not None and not self.scaling.update(p.grad for p in self.parameters):
            return False
        optimizer.step()
        return True

    def schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> Any:
        """The workload's own schedule of a training of so many steps, or None."""
        found = self._call("schedule", optimizer, steps) if self.workload.brings("schedule") else None
        if found is not None and not isinstance(found, torch.optim.lr_scheduler.LRScheduler):
            raise self._error("schedule", f"returned {type(found).__name__}: give a torch.optim.lr_scheduler")
        return found

    def loader(self, n: int, workers: int | None = None) -> Any:
        """The workload's own DataLoader; WorkloadError where it gives none."""
        found = self._call("loader", n, workers)
        if not isinstance(found, torch.utils.data.DataLoader):
            raise self._error("loader", f"returned {type(found).__name__}: give a torch.utils.data.DataLoader")
        return found

    def batch(self, n: int, split: Split = "train") -> Any:
        """Draw n examples and move them to the device."""
        return self.moved(self._drawn(n, split))

    def timed_batch(self, n: int) -> Any:
        """As `batch`, for steps that are timed alone: see `Workload.timed_batch`."""
        own = self.workload.brings("timed_batch")
        return self.moved(self._checked("timed_batch", n) if own else self._drawn(n, "train"))

    def weighed_batch(self, n: int) -> tuple[Any, torch.Tensor | None]:
        """As `batch`, and what its examples count for in the loss: float64 [n] on the CPU; None: all alike."""
        batch = self._drawn(n, "train")
        own = self.workload.brings("example_weights")
        found = self._call("example_weights", copied(batch)) if own else None
        return self.moved(batch), None if found is None else self._weights(found, n)

    def _weights(self, found: Any, n: int) -> torch.Tensor:
        if not isinstance(found, torch.Tensor) or found.shape != (n,):
            what = f"shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
            raise self._error("example_weights", f"returned {what}: give one weight for each of the {n} examples")
        weights = found.detach().double().cpu()
        if not (weights.isfinite().all() and (weights >= 0).all() and weights.sum() > 0):
            text = f"returned weights from {float(weights.min()):g} to {float(weights.max()):g}: they are counts"
            raise self._error("example_weights", f"{text}, at least 0, and some above it")
        return weights

    def _drawn(self, n: int, split: Split) -> Any:
        return self._checked("batch", n, split)

    def _checked(self, method: str, n: int, *split: Split) -> Any:
        batch = self._call(method, n, self.generator, *split)
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
        if not tensors:
            kinds = ", ".join(dict.fromkeys(type(leaf).__name__ for leaf in tree_leaves(batch)[:100]))
            raise self._error(method, f"returned {type(batch).__name__} of {kinds or 'nothing'} without a tensor in it")
        sizes = {tuple(t.shape[:1]) for t in tensors if t.ndim}
        if (n,) not in sizes:
            shapes = ", ".join(str(tuple(t.shape)) for t in tensors[:4])
            what = f"was asked for {counted(n, 'example')} and returned shapes {shapes}; dimension 0 must be {n}"
            refused = self._error(method, what)
            refused.rows = min(size[0] for size in sizes) if sizes else None
            raise refused
        return batch

    def moved(self, batch: Any) -> Any:
        """The batch on the device, in memory of its own there: the workload may keep what it returned, or reuse it."""
        moved = tree_map(lambda leaf: upload(leaf, self.device) if isinstance(leaf, torch.Tensor) else leaf, batch)
        return copied(moved) if self.device.type == "cpu" else moved

    def loss(self, batch: Any) -> torch.Tensor:
        """The loss of a batch, under autocast where the dtype asks for it; checked to be one floating-point number.

        Whether it is finite is left to `check_finite`, which synchronizes with the device.
        """
        loss = self._loss(self._runs, batch)
        if not loss.requires_grad:
            raise self._error("loss", "returned a tensor without a gradient: it must depend on the model's parameters")
        return loss

    @torch.no_grad()
    def evaluate(self, batch: Any) -> torch.Tensor:
        """The loss of a batch in evaluation mode, without a gradient; NaN of a training that has diverged in fp16.

        The batch stays as it is.
        """
        if self.scaling is not None and self.scaling.diverged:
            return torch.tensor(math.nan)
        self.model.eval()
        try:
            return self._loss(self.model, copied(batch))
        finally:
            self.model.train()

    @torch.no_grad()
    def metrics(self, batch: Any, names: Sequence[str]) -> list[float]:
        """These metrics of a batch in evaluation mode; the batch stays as it is. WorkloadError where one is missing."""
        self.model.eval()
        try:
            with torch.autocast(self.device.type, DTYPES[self.dtype], enabled=self.dtype != "fp32"):
                found = self._call("metrics", self.model, copied(batch))
        finally:
            self.model.train()
        if not isinstance(found, Mapping):
            raise self._error("metrics", f"returned {type(found).__name__}: give figures by name")
        if lacking := [name for name in names if name not in found]:
            has = ", ".join(map(str, found)) or "nothing"
            raise self._error("metrics", f"returned {has}, and a target names {lacking[0]!r}")
        try:
            return [float(found[name]) for name in names]
        except (TypeError, ValueError, RuntimeError) as error:
            raise self._error("metrics", f"returned no number for one of {', '.join(names)}: {error}") from None

    def backward(self, batch: Any, scale: float = 1.0) -> torch.Tensor:
        """Forward and backward of `scale` times the loss; gradients are left in `.grad`. Returns the loss, detached."""
        loss = self.loss(batch)
        try:
            factor = scale * self.loss_scale
            (loss if factor == 1.0 else loss * factor).backward()  # type: ignore[no-untyped-call]
        except (torch.OutOfMemoryError, MemoryError, KeyboardInterrupt):
            raise
        except BaseException as error:  # hooks and functions of the user's own run in it
            if is_out_of_memory(error):
                raise
            cause = f"{error}" if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
            raise self._error("loss", f"failed in its backward pass: {cause}") from error
        return loss.detach()

    def check_finite(self, loss: torch.Tensor, where: str) -> float:
        """The loss as a number; the workload's error are NaN, infinity, and updates as of `update`. Synchronizes."""
        if self.scaling is not None and self.scaling.diverged:
            raise self._error(
                "loss",
                f"gives gradients that overflow fp16: {self.scaling.skipped} updates in a row were left out, the last "
                f"with losses scaled by {self.scaling.value:.2g}. Take dtype bf16 or fp32, or a lower learning rate",
            )
        value = float(loss)
        if not torch.isfinite(loss):
            raise self._error("loss", f"returned {value} {where}")
        return value

    def loss_of(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """The loss of a batch as this model has it, under autocast where the dtype asks for it."""
        return self._loss(model, batch)

    def _loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        with torch.autocast(self.device.type, DTYPES[self.dtype], enabled=self.dtype != "fp32"):
            loss = self._call("loss", model, batch)
        if not isinstance(loss, torch.Tensor):
            raise self._error(
                "loss", f"returned {type(loss).__name__}, not a tensor: return the mean loss, nothing else"
            )
        if loss.ndim or not loss.is_floating_point():  # shape (1,) too: at batch 1 it may be a loss per example
            raise self._error(
                "loss",
                f"returned {loss.dtype} of shape {tuple(loss.shape)}, not one number: take the mean over examples",
            )
        return loss

    def _call(self, method: str, *arguments: Any) -> Any:
        before, what = self._lookout.before(method), None
        with called(f"{type(self.workload).__name__}.{method}()") as call:
            try:
                found = getattr(self.workload, method)(*arguments)
            except (torch.OutOfMemoryError, MemoryError, WorkloadError, UsageError):
                raise
            except KeyboardInterrupt:
                if call.ended is None:
                    raise
                raise self._error(method, call.ended) from None
            except BaseException as error:  # `sys.exit()`, GeneratorExit and cancelled tasks too are no answer
                if is_out_of_memory(error):
                    raise
                failure = self._error(method, f"raised {told(error)}{_asked(method, error)}")
                failure.begun = method == "batch"  # whoever trains has drawn the fixed batches before
                raise failure from error
            finally:
                if before is not None:
                    what = self._lookout.changed(before, method)
        if what is not None:
            raise self._error(
                method,
                f"changes {what} in the middle of a run. Do it at the top of the file or in the constructor, where "
                "numerical settings are honoured and recorded",
            )
        return found

    def _error(self, method: str, what: str) -> WorkloadError:
        return WorkloadError(f"{type(self.workload).__name__}.{method}() of workload {self.workload.name!r} {what}.")


def _asked(method: str, error: BaseException) -> str:
    """How a method is called, where an error says that it does not take these arguments."""
    if not isinstance(error, TypeError) or (error.__traceback__ and error.__traceback__.tb_next):
        return ""
    base = getattr(Workload, method, None)
    takes = [name for name in inspect.signature(base).parameters if name != "self"] if base is not None else []
    return f"; it is called as {method}({', '.join(takes)})" if takes else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out; the CPU allocator and cuBLAS raise plain RuntimeErrors."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        part in text
        for part in (
            "not enough memory",
            "can't allocate memory",  # CPU allocator on Linux
            "out of memory",
            "std::bad_alloc",
            "CUBLAS_STATUS_ALLOC_FAILED",
            "CUDNN_STATUS_ALLOC_FAILED",
        )
    )


def fixed_batches(workload: Workload, device: torch.device, dtype: str = "fp32") -> tuple[Any, Any]:
    """The batches of training and test examples whose losses are compared: the same for all trials."""
    count = workload.evaluation_examples
    if not isinstance(count, int) or count < 1:
        raise WorkloadError(
            f"workload {workload.name!r}: evaluation_examples is {count!r}. Give the number of examples of the fixed "
            "batches on which losses are taken, such as 512."
        )
    session = Session(workload, device, dtype, EVALUATION_SEED)
    return session.batch(count, "train"), session.batch(count, "test")
