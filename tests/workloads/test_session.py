"""Every fault of a user's workload is an error that names the method; running out of memory is not a fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pybatch.base.errors import DeviceError, UsageError, WorkloadError
from pybatch.workloads.base import Split, Workload
from pybatch.workloads.running.session import Session, is_out_of_memory

CPU = torch.device("cpu")


class Planted(Workload):
    """A linear model whose methods a test may replace."""

    name = "planted"

    def __init__(self, **methods: Callable[..., Any]) -> None:
        self.methods = methods

    def model(self) -> nn.Module:
        found: nn.Module = self.methods.get("model", lambda: nn.Linear(3, 1))()
        return found

    def batch(self, n: int, generator: torch.Generator, split: Split = "train") -> Any:
        draw = self.methods.get("batch", lambda n, g, s: torch.randn(n, 3, generator=g))
        return draw(n, generator, split)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        found: torch.Tensor = self.methods.get("loss", lambda m, b: m(b).square().mean())(model, batch)
        return found


def fail(*_: Any) -> None:
    raise KeyError("gone")


def one_step(work: Workload) -> torch.Tensor:
    session = Session(work, CPU)
    loss = session.backward(session.batch(4))
    session.check_finite(loss, "at batch 4")
    return loss


def test_a_sound_workload_leaves_gradients() -> None:
    session = Session(Planted(), CPU, seed=3)
    loss = session.backward(session.batch(4))
    assert not loss.requires_grad
    assert all(p.grad is not None for p in session.parameters)


@pytest.mark.parametrize(
    ("method", "planted", "complaint"),
    [
        ("model", fail, r"raised KeyError: 'gone', at .*test_session\.py, line \d+: `raise KeyError\(\"gone\"\)`\.$"),
        ("model", lambda: "net", "returned str, not a torch.nn.Module"),
        ("model", nn.ReLU, "without a parameter"),
        ("batch", fail, "raised KeyError"),
        ("batch", lambda n, g, s: [1, 2], "without a tensor"),
        ("batch", lambda n, g, s: torch.ones(n - 1, 3), r"asked for 4 examples and returned shapes \(3, 3\)"),
        ("loss", fail, "raised KeyError"),
        ("loss", lambda m, b: 1.0, "returned float, not a tensor"),
        ("loss", lambda m, b: m(b), r"of shape \(4, 1\), not one number: take the mean"),
        ("loss", lambda m, b: torch.tensor(1), "int64"),
        ("loss", lambda m, b: torch.tensor(1.0), "without a gradient"),
        ("loss", lambda m, b: m(b).mean() * float("nan"), "returned nan at batch 4"),
        ("loss", lambda m, b: m(b).mean() / 0.0, r"returned -?inf at batch 4"),
    ],
)
def test_a_fault_names_the_class_the_method_and_the_cause(method: str, planted: Any, complaint: str) -> None:
    with pytest.raises(WorkloadError, match=rf"Planted\.{method}\(\) of workload 'planted' .*{complaint}"):
        one_step(Planted(**{method: planted}))


def test_a_method_of_other_arguments_is_told_how_it_is_called() -> None:
    class Short(Planted):
        def batch(self, n: int) -> Any:  # type: ignore[override]
            return torch.ones(n, 3)

    with pytest.raises(WorkloadError, match=r"but 4 were given; it is called as batch\(n, generator, split\)\.$"):
        Session(Short(), CPU).batch(4)


def test_a_batch_of_another_size_says_of_which() -> None:
    for rows in (32, 3):
        session = Session(Planted(batch=lambda n, g, s, rows=rows: torch.ones(rows, 3)), CPU)
        with pytest.raises(WorkloadError, match="dimension 0 must be 4") as caught:
            session.batch(4)
        assert caught.value.rows == rows


@pytest.mark.parametrize(
    ("slip", "value", "meant"),
    [
        ("lerning_rate", 1e-3, "learning_rate"),
        ("learnign_rate", 1e-3, "learning_rate"),
        ("referense_batch", 64, "reference_batch"),
        ("reference_bach", 64, "reference_batch"),
        ("targets", {"train": 0.3}, "target"),
    ],
)
def test_a_name_that_can_only_be_a_slip_is_asked_about(slip: str, value: Any, meant: str) -> None:
    for work in (type("Mine", (Planted,), {slip: value})(), Planted()):
        if type(work) is Planted:
            setattr(work, slip, value)
        with pytest.raises(WorkloadError, match=rf"\.{slip}: is it {meant}\? Name it so"):
            Session(work, CPU)


@pytest.mark.parametrize(
    "own",
    [
        {
            "targets": torch.ones(3),
            "stepz": "a",
            "example": 3,
            "units": 64,
            "step": 3,
            "names": "abc",
            "option": {"a": 1},
        },
        {"learning_rate_g": 1e-4, "learning_rate_d": 4e-4},
        {"learning_rate_d": 4e-4},
        {"learning_rate2": 1e-3, "learning_rate_2": 1e-3, "steps2": 3, "steps_": 7, "nsteps": 5, "max_steps": 9},
        {"learning_rates": 1e-3, "weight_units": "x", "reference_batch_": 3, "examples_": 100},
        {"target": {"train": 0.3}, "targets": {"train": 0.4}},
    ],
)
def test_names_of_ones_own_are_left_alone(own: dict[str, Any]) -> None:
    Session(type("Mine", (Planted,), own)(), CPU)
    below = type("Below", (type("Mine", (Planted,), own),), {})()
    below.targets = {"train": 0.1} if "target" in own else None
    Session(below, CPU)


def test_a_failing_backward_pass_is_the_losss_fault() -> None:
    class Refuse(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError("no way back")

    with pytest.raises(WorkloadError, match=r"Planted\.loss\(\).*backward pass: no way back"):
        one_step(Planted(loss=lambda m, b: Refuse.apply(m(b)).mean()))


class Stuck(nn.Linear):
    """Cannot leave the place where it was made."""

    def __init__(self, error: Exception) -> None:
        super().__init__(1024, 256)
        self.error = error

    def to(self, *arguments: Any, **options: Any) -> Any:
        raise self.error


@pytest.mark.parametrize(
    ("error", "says", "memory"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nto"),
            "does not fit on cpu, out of memory: OutOfMemoryError: CUDA",
            True,
        ),
        (MemoryError(), "does not fit on cpu, out of memory: MemoryError. Take a smaller model", True),
        (
            RuntimeError("CUDA error: busy"),
            "cannot be moved to cpu: RuntimeError: CUDA error: busy. Name another",
            False,
        ),
        (NotImplementedError("Cannot copy out of meta tensor"), "cannot be moved to cpu: NotImplementedError", False),
    ],
)
def test_a_model_that_cannot_be_moved_is_an_error_with_its_size(error: Exception, says: str, memory: bool) -> None:
    with pytest.raises(DeviceError, match="the model of workload 'planted'") as caught:
        Session(Planted(model=lambda: Stuck(error)), CPU)
    assert f"(1.00 MiB) {says}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert is_out_of_memory(caught.value) == memory  # where running out is a measurement, it still is


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:7"])
def test_a_gpu_that_is_not_there_is_such_an_error(name: str) -> None:
    with pytest.raises(DeviceError, match=f"cannot be moved to {name}: .*Name another device"):
        Session(Planted(), torch.device(name))


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_running_out_of_memory_passes_unchanged(error: BaseException) -> None:
    def planted(*_: Any) -> None:
        raise error

    for method in ("batch", "loss"):
        with pytest.raises(type(error)) as caught:
            one_step(Planted(**{method: planted}))
        assert caught.value is error


def test_the_cpu_allocators_own_message_is_recognized() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_seed_fixes_model_and_batches_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (Session(Planted(), CPU, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.model.weight, b.model.weight)  # type: ignore[arg-type]
    assert not torch.equal(a.model.weight, c.model.weight)  # type: ignore[arg-type]
    assert torch.equal(a.batch(2), b.batch(2))


@pytest.mark.isa
def test_bf16_runs_under_autocast_over_fp32_parameters() -> None:
    seen: list[torch.dtype] = []

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = model(batch)
        seen.append(out.dtype)
        return out.float().square().mean()

    session = Session(Planted(loss=loss), CPU, dtype="bf16")
    session.backward(session.batch(4))
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in session.parameters} == {torch.float32}


def test_an_unknown_dtype_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"dtype 'fp8' is not known\. Use one of: fp32, bf16"):
        Session(Planted(), CPU, dtype="fp8")


def test_info_is_the_records_view() -> None:
    info = Session(Planted(), CPU).info
    assert (info.name, info.unit, info.parameters, info.dtype) == ("planted", "examples", 4, "fp32")
