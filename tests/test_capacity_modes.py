"""How steps are run and what bounds them: compiled, captured, after a rest; bytes moved; the limit of each batch."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pybatch.capacity import measurement, modes
from pybatch.capacity.bound import NEAR, WAITING, Place, bound
from pybatch.capacity.burst import BURST_STEPS, Settling
from pybatch.capacity.exploration import Explorer, explore_given
from pybatch.capacity.flops import count_flops
from pybatch.capacity.measurement import measure_capacity
from pybatch.capacity.modes import EAGER, GraphedStep, Mode
from pybatch.capacity.step import TrainingStep
from pybatch.capacity.stopping import StoppingRule
from pybatch.capacity.timing import Rounds
from pybatch.capacity.traffic import Traffic, update_bytes
from pybatch.device.clock import Clock, WallClock
from pybatch.errors import UsageError, WorkloadError
from pybatch.records import BatchPoint, Capacity, Ceilings, ThroughputFit
from pybatch.workloads import compiling
from pybatch.workloads.base import Split, Workload
from pybatch.workloads.session import Session

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import roofs  # type: ignore[import-not-found, unused-ignore]

CPU = torch.device("cpu")
CACHE = 32 << 20
# Importing torch's compiler warns of itself.
compiler = pytest.mark.filterwarnings("default::DeprecationWarning:torch")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


class Small(Workload):
    """Two layers."""

    name = "small"

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def batch(self, n: int, generator: torch.Generator, split: Split = "train") -> torch.Tensor:
        return torch.randn(n, 4, generator=generator)

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(batch).square().mean()
        return loss


# Bytes.


def moved(work: Callable[[], object]) -> int:
    with Traffic() as traffic:
        work()
    found: int = traffic.bytes
    return found


A, B = torch.randn(8, 16), torch.randn(16, 4)
ROW = torch.randn(16)
IDS = torch.tensor([3, 3, 0])


@pytest.mark.parametrize(
    ("work", "numbers"),
    [
        (lambda: A @ B, 8 * 16 + 16 * 4 + 8 * 4),
        (lambda: A + 1.0, 2 * 8 * 16),
        (lambda: A.clone().mul_(2.0), (2 + 2) * 8 * 16),  # cloned, then read and written in place
        (lambda: torch.empty_like(A).copy_(A), 2 * 8 * 16),  # the copy's target is not read
        (lambda: torch.empty_like(A).fill_(1.0), 8 * 16),
        (lambda: torch.mm(A, B, out=torch.empty(8, 4)), 8 * 16 + 16 * 4 + 8 * 4),
        (lambda: A.t().view(16, 2, 4).transpose(0, 1)[0].detach(), 0),  # views
        (lambda: ROW.expand(8, 16) + A, 16 + 2 * 8 * 16),  # an expanded row is read once
        (lambda: torch.cat([A, A]), 4 * 8 * 16),
    ],
)
def test_bytes_are_what_operators_read_and_write(work: Callable[[], object], numbers: int) -> None:
    assert moved(work) == 4 * numbers


def test_a_lookup_reads_the_rows_it_gives_not_the_whole_table() -> None:
    table = torch.randn(1000, 16)
    assert moved(lambda: nn.functional.embedding(IDS, table)) == 4 * 2 * 3 * 16 + 8 * 3


def test_an_adamw_update_moves_28_bytes_a_parameter() -> None:
    step = TrainingStep(Session(Small(), CPU))
    step.load(2)
    step()
    parameters = sum(p.numel() for p in step.session.parameters)
    assert update_bytes(step.session.parameters, step.optimizer.state) == 28 * parameters


# The benchmark's workloads: what a roof is compared with is counted exactly.


def counted(work: Workload, n: int) -> tuple[int | None, int, TrainingStep]:
    step = TrainingStep(Session(work, CPU))
    step.load(n)
    step()
    with Traffic() as traffic:
        flops, reason = count_flops(step)
    assert reason is None
    return flops, traffic.bytes, step


@pytest.mark.parametrize(("width", "depth", "n"), [(8, 1, 4), (16, 6, 32)])
def test_products_are_counted_as_three_per_layer_but_the_first_ones_input(width: int, depth: int, n: int) -> None:
    work = roofs.Products(width, depth)
    flops, _, _ = counted(work, n)
    assert flops == work.flops(n) == (3 * depth - 1) * 2 * n * width**2


def test_a_copy_is_counted_as_read_once_and_written_once() -> None:
    work = roofs.Copies(width=1024)
    flops, read_and_written, step = counted(work, 64)
    update = update_bytes(step.session.parameters, step.optimizer.state)
    assert flops == 0
    assert 0 <= read_and_written - work.bytes(64) < 100  # the loss of one number
    assert update == 28


# Ceilings of 1e9 FLOP/s and B/s make shares easy to read.
def test_shares_of_the_roofs_are_work_over_time_over_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "measure_ceilings", lambda *a: Ceilings(1e9, 2e9))
    work = roofs.Products(8, 2)
    found = measure(work, PlantedClock(1e-3, 1e-5), [4, 8, 16])
    for p in found.batches:
        assert p.step_ms is not None
        assert p.step_bytes is not None
        _, traffic, step = counted(work, p.batch)
        assert p.step_bytes == traffic + update_bytes(step.session.parameters, step.optimizer.state)
        assert p.mfu_measured == pytest.approx(work.flops(p.batch) / (p.step_ms / 1e3) / 1e9)
        assert p.mbu_measured == pytest.approx(p.step_bytes / (p.step_ms / 1e3) / 2e9)


# Burst and sustained.


class PlantedClock(Clock):
    """alpha + beta n seconds a step; `slowed` times that once the device has worked `patience` s without a rest."""

    def __init__(self, alpha: float, beta: float, slowed: float = 1.0, patience: float = 1.0) -> None:
        self.alpha, self.beta, self.slowed, self.patience = alpha, beta, slowed, patience
        self.time_s = self.busy_s = 0.0
        self.batch: Callable[[], int] = lambda: 0
        self.rng = np.random.default_rng(0)

    def time(self, work: Callable[[], object], count: int) -> list[float]:
        work()
        found = []
        for _ in range(count):
            step = (self.alpha + self.beta * self.batch()) * float(np.exp(self.rng.normal(0, 0.005)))
            step *= self.slowed if self.busy_s > self.patience else 1.0
            self.busy_s += step
            self.time_s += step
            found.append(step)
        return found

    def now(self) -> float:
        return self.time_s

    def rest(self, seconds: float) -> None:
        self.time_s += seconds
        self.busy_s = 0.0


class NoMemory:
    reason = "not read here"

    def start(self) -> None: ...

    def rebase(self, held_bytes: int) -> None: ...

    def peak(self) -> None: ...


def measure(
    work: Workload, clock: PlantedClock, batches: list[int] | None, budget: float = 100.0, mode: Mode = EAGER
) -> Capacity:
    run = measurement._Measurement(work, CPU, "fp32", batches, budget, 0, clock, mode=mode)
    clock.batch = lambda: run.explorer.step.batch_size
    run.explorer.memory = NoMemory()  # type: ignore[assignment]
    run.measure(False)
    return run.capacity()


def test_burst_and_sustained_are_two_numbers_and_the_fit_is_of_the_sustained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "measure_ceilings", lambda *a: Ceilings(1e12, 1e12))
    found = measure(Small(), PlantedClock(2e-3, 1e-5, slowed=1.3), [1, 16, 64, 256, 1024])
    bursts = {p.batch: p.burst_step_ms for p in found.batches if p.burst_step_ms is not None}
    assert {64, 1024} <= bursts.keys()  # the middle one, and the largest
    for p in found.batches:
        truth = 2 + 0.01 * p.batch
        assert p.step_ms == pytest.approx(1.3 * truth, rel=0.01)
        if p.batch in bursts:
            assert bursts[p.batch] == pytest.approx(truth, rel=0.01)
    assert found.model is not None
    assert found.model.beta_s == pytest.approx(1.3e-5, rel=0.03)
    assert found.drift == pytest.approx(0, abs=0.02)  # it had settled before timing began
    assert any("longer than its first 100 after a rest" in note.text for note in found.notes)


def test_a_device_that_keeps_its_clock_has_one_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "measure_ceilings", lambda *a: Ceilings(1e12, 1e12))
    found = measure(Small(), PlantedClock(2e-3, 1e-5), [1, 16, 64, 256])
    for p in found.batches:
        assert p.burst_step_ms is None or p.burst_step_ms == pytest.approx(p.step_ms, rel=0.01)
    assert not any("after a rest" in note.text for note in found.notes if note.figure == "batches.step_ms")
    assert not any("settled" in note.text for note in found.notes)


def test_without_time_for_rests_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "measure_ceilings", lambda *a: Ceilings(1e12, 1e12))
    found = measure(Small(), PlantedClock(2e-3, 1e-5), [1, 16, 64], budget=8.0)
    assert {p.burst_step_ms for p in found.batches} == {None}
    assert any(note.figure == "batches.burst_step_ms" and "rests" in note.text for note in found.notes)
    assert any("settled" in note.text for note in found.notes)


def test_settling_rests_before_each_burst_and_passes_over_what_fails() -> None:
    clock, loaded = PlantedClock(1e-3, 0.0), [0]

    def load(n: int) -> None:
        loaded.append(n)
        if n == 8:
            raise WorkloadError("not at 8")

    settling = Settling(load, lambda: None, clock)
    settling.measure({1: 1e-3, 2: 1e-3, 4: 1e-3, 8: 1e-3}, deadline=2.5)
    assert loaded == [0, 4, 8, 2]  # the middle, then from the largest down while there is time
    assert settling.bursts.keys() == {4, 2}
    assert clock.now() == pytest.approx(2 * (1.0 + (1 + BURST_STEPS) * 1e-3), rel=0.05)
    with pytest.raises(ZeroDivisionError):  # a fault of pybatch's own is not hidden
        Settling(load, lambda: 1 / 0, clock).warm_up({1: 1e-3}, 100.0)


# What bounds a batch.

GPU = Place("cuda", "bf16", CACHE)
HOST = Place("cpu", "fp32", CACHE)
LARGE = 8 * CACHE


def point(**figures: Any) -> BatchPoint:
    given: dict[str, Any] = {"batch": 64, "status": "ok", "step_ms": 10.0} | figures
    return BatchPoint(**given)


@pytest.mark.parametrize(
    ("place", "figures", "limit", "evidence"),
    [
        (GPU, {"host_bound": 0.7, "mfu_measured": 0.1}, "host", "70.0 %"),
        (GPU, {"host_bound": WAITING, "tensor_active": 0.9}, "host", "30.0 %"),
        (GPU, {"step_ms": 4.0, "eager_step_ms": 10.0, "launch_overhead_ms": 6.0, "host_bound": 0.0}, "launch", "60.0"),
        # Little is won by replaying: the launches are not it.
        (GPU, {"eager_step_ms": 10.5, "launch_overhead_ms": 0.5, "tensor_active": 0.8}, "tensor", "80.0 %"),
        (GPU, {"host_bound": 0.1, "dram_active": 0.85, "tensor_active": 0.3}, "memory", "85.0 %"),
        (GPU, {"host_bound": 0.1, "dram_active": 0.65, "tensor_active": 0.75}, "tensor", "75.0 %"),
        (GPU, {"host_bound": 0.1, "mfu_measured": 0.9}, "tensor", "90.0 %"),
        (Place("cuda", "fp32", CACHE), {"host_bound": 0.1, "mfu_measured": 0.9}, "compute", "90.0 %"),
        (GPU, {"host_bound": 0.1, "dram_active": 0.85, "power_capped": True}, "power", "power limit"),
        # Waiting for the host, a capped clock costs nothing.
        (GPU, {"host_bound": 0.8, "power_capped": True}, "host", "80.0 %"),
        (GPU, {"host_bound": 0.1, "mbu_measured": 0.9, "memory_bytes": LARGE}, "memory", "90.0 %"),
        # A counter is believed before a count of bytes.
        (GPU, {"dram_active": 0.2, "mbu_measured": 0.9, "memory_bytes": LARGE}, None, "no limit is near"),
        (HOST, {"mfu_measured": 0.95, "mbu_measured": 0.1}, "compute", "95.0 %"),
        (HOST, {"mfu_measured": 0.05, "mbu_measured": 0.8, "memory_bytes": LARGE}, "memory", "80.0 %"),
        # The same bytes in a working set that caches hold say nothing of memory.
        (HOST, {"mfu_measured": 0.05, "mbu_measured": 0.8, "memory_bytes": CACHE}, None, "no limit is near"),
        (HOST, {"mfu_measured": NEAR - 0.01, "mbu_measured": 0.1}, None, "59.0 %"),
        (HOST, {}, None, "no roof"),
        (HOST, {"step_ms": None}, None, "not timed"),
    ],
)
def test_the_limit_follows_from_the_figures(
    place: Place, figures: dict[str, Any], limit: str | None, evidence: str
) -> None:
    found, why = bound(point(**figures), place)
    assert found == limit
    assert evidence in why


@pytest.mark.parametrize(("batch", "limit"), [(1, "host"), (100, "host"), (150, None), (10_000, None)])
def test_on_a_cpu_a_fixed_cost_far_from_every_roof_is_the_hosts(
    fit: ThroughputFit, batch: int, limit: str | None
) -> None:
    flat = dataclasses.replace(fit, alpha_s=1e-3, t0_s=1e-3, beta_s=1e-5)  # half of the step is fixed at batch 100
    low = {"batch": batch, "mfu_measured": 0.02, "mbu_measured": 0.05}
    assert bound(point(**low), HOST, flat)[0] == limit
    assert bound(point(**low, host_bound=0.1), GPU, flat)[0] is None  # a GPU's fixed part may be anything
    assert bound(point(batch=batch, mfu_measured=0.02), HOST, flat)[0] is None  # the bytes are not known


# CUDA graphs.


@no_gpu
def test_graphs_without_a_gpu_are_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "_Measurement", lambda *a: pytest.fail("measured"))
    with pytest.raises(UsageError, match=r"--cuda-graph.*on cpu: only a CUDA device.*Leave that out"):
        measure_capacity(Small(), device="cpu", graph=True)


class FakeCuda:
    """Writes down what is done on which stream, and whether it was captured."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.where = "main"

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
        cuda = SimpleNamespace(
            device=lambda device: self._inside("main", []),
            Stream=lambda device: self._stream("side"),
            current_stream=lambda device: self._stream("main"),
            stream=lambda stream: self._inside(stream.name, []),
            CUDAGraph=self._graph,
            graph=lambda graph: self._inside("capture", graph.work),
        )
        monkeypatch.setattr(modes, "cuda", cuda)
        return self

    def did(self, what: str) -> None:
        self.events.append(f"{self.where}: {what}")
        if self.where == "capture":
            self.recorded.append(what)

    def _inside(self, where: str, recorded: list[str]) -> Any:
        @contextmanager
        def inside() -> Any:
            before, self.where, self.recorded = self.where, where, recorded
            yield
            self.where = before

        return inside()

    def _stream(self, name: str) -> Any:
        return SimpleNamespace(
            name=name, wait_stream=lambda other: self.events.append(f"{name} waits for {other.name}")
        )

    def _graph(self) -> Any:
        work: list[str] = []
        return SimpleNamespace(work=work, replay=lambda: self.events.append(f"replay {'+'.join(work)}"))


class FakeStep:
    """A step that says what it does, in place of `TrainingStep`."""

    def __init__(self, cuda: FakeCuda, error: Exception | None = None) -> None:
        self.cuda, self.error = cuda, error
        self.session = SimpleNamespace(device=torch.device("cuda:0"), workload=Small())
        self.optimizer = SimpleNamespace(
            step=lambda: cuda.did("update"), zero_grad=lambda set_to_none: cuda.did(f"no gradients ({set_to_none})")
        )

    def load(self, n: int) -> None:
        self.cuda.did(f"load {n}")

    def clear(self) -> None: ...

    def backward(self) -> None:
        if self.error is not None and self.cuda.where == "capture":
            raise self.error
        self.cuda.did("backward")

    def __call__(self) -> None:
        self.backward()
        self.optimizer.step()


def test_a_step_is_warmed_up_on_a_side_stream_captured_in_two_graphs_and_replayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda().install(monkeypatch)
    step = GraphedStep(FakeStep(cuda))  # type: ignore[arg-type]
    step.load(4)
    assert cuda.events == ["main: load 4"]  # until the first call an eager step may be timed
    step()
    step()
    warm = ["side: backward", "side: update"] * 3
    # Between the captures the gradients get values, and the update's table their addresses.
    captured = ["capture: backward", "replay backward", "main: update", "capture: update"]
    assert cuda.events[1:] == [
        "side waits for main",
        *warm,
        "main waits for side",
        "main: no gradients (True)",
        *captured,
        *["replay backward", "replay update"] * 2,
    ]
    cuda.events.clear()
    step.load(8)
    step()
    assert cuda.events[0] == "main: load 8"
    assert cuda.events[-4:] == ["main: update", "capture: update", "replay backward", "replay update"]


def test_a_step_that_cannot_be_captured_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda().install(monkeypatch)
    step = GraphedStep(FakeStep(cuda, RuntimeError("operation not permitted")))  # type: ignore[arg-type]
    with pytest.raises(WorkloadError, match=r"'small' cannot be captured .*not permitted.*Leave out --cuda-graph"):
        step()
    step = GraphedStep(FakeStep(cuda, torch.OutOfMemoryError("CUDA out of memory")))  # type: ignore[arg-type]
    with pytest.raises(torch.OutOfMemoryError):  # a measurement, not a fault
        step()


def test_the_eager_step_is_timed_beside_the_replay_before_the_capture() -> None:
    clock, order = PlantedClock(1e-3, 0.0), list[str]()
    region = SimpleNamespace(device=CPU, start=lambda: None, stop=lambda: None)
    rounds = Rounds(
        lambda n: order.append("load"),
        lambda: order.append("replay"),
        lambda: None,
        clock,
        region,  # type: ignore[arg-type]
        StoppingRule(),
        0,
        eager=lambda: order.append("eager"),
    )
    rounds.run({8: 1e-3}, deadline=20.0)
    assert order[:4] == ["load", "eager", "eager", "replay"]
    after = "".join(order[4:])
    assert "loadeager" in after  # the anchor's last visit is a series of its own
    assert "replayeager" not in after  # never after a capture, which an eager step would spoil
    assert rounds.series[8].eager_s == pytest.approx(1e-3, rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replays_leave_the_gradients_of_an_eager_step() -> None:
    device = torch.device("cuda:0")
    step = TrainingStep(Session(Small(), device), capturable=True)
    graphed = GraphedStep(step)
    graphed.load(16)
    step()
    eager = [p.grad.clone() for p in step.session.parameters if p.grad is not None]
    for _ in range(3):
        graphed()
    torch.cuda.synchronize(device)
    graphed.check()
    for p, expected in zip(step.session.parameters, eager, strict=True):
        torch.testing.assert_close(p.grad, expected)
    found = measure_capacity(
        Small(), device=device, batches=[1, 8, 64], graph=True, time_budget=20, find_max_batch=False
    )
    assert found.mode == "graph"
    for timed in found.batches:
        assert timed.step_ms is not None
        assert timed.eager_step_ms is not None
        assert timed.launch_overhead_ms == pytest.approx(timed.eager_step_ms - timed.step_ms)


# torch.compile. Inductor takes many seconds a batch size; backends that only trace are enough to test what is ours.


@pytest.fixture
def tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_BACKEND", "eager")
    torch.compiler.reset()


@compiler
@pytest.mark.usefixtures("tracing")
def test_compiled_steps_are_told_from_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "measure_ceilings", lambda *a: Ceilings(1e12, 1e12))
    batches = list(range(2, 14))  # more than the 8 shapes after which torch gives up by itself
    before = compiling.graphs_compiled()
    found = measure(Small(), PlantedClock(1e-3, 1e-5), batches, mode=Mode(compile=True))
    assert found.mode == "compiled"
    assert compiling.graphs_compiled() - before == 12 + 1  # each size once, and the 1 of the first step
    for p in found.batches:
        assert p.status == "ok"
        assert p.compile_s is not None
        assert p.step_ms is not None
        assert p.compile_s > 0
        assert p.step_ms == pytest.approx(1 + 0.01 * p.batch, rel=0.02)  # without it
        assert p.model_flops == 2 * p.batch * (2 * 4 * 8 + 3 * 8)  # counted on the model as it was written
        assert p.step_bytes is None
    assert any(note.figure == "batches.step_bytes" and "fuses" in note.text for note in found.notes)


@compiler
@pytest.mark.usefixtures("tracing")
def test_batch_sizes_on_the_way_to_a_distant_one_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "measure_ceilings", lambda *a: Ceilings(1e12, 1e12))
    step = TrainingStep(Session(Small(), CPU), compile=True)
    explorer = Explorer(step, WallClock(), NoMemory(), None)  # type: ignore[arg-type]
    explore_given(explorer, [1, 500], deadline=WallClock().now() + 60, step_limit=10)
    assert [look.batch for look in explorer.working] == [1, 8, 64, 500]
    assert list(step.compile_s) == [1, 500]


@compiler
@pytest.mark.usefixtures("tracing")
def test_evaluation_and_the_model_itself_stay_as_they_were() -> None:
    session = Session(Small(), CPU)
    names = [name for name, _ in session.model.named_parameters()]
    batch = session.batch(4)
    eager = session.backward(batch)
    gradients = [p.grad.clone() for p in session.parameters if p.grad is not None]
    session.compile()
    for p in session.parameters:
        p.grad = None
    torch.testing.assert_close(session.backward(batch), eager)
    for p, expected in zip(session.parameters, gradients, strict=True):
        torch.testing.assert_close(p.grad, expected)
    before = compiling.graphs_compiled()
    torch.testing.assert_close(session.evaluate(batch), eager)
    assert compiling.graphs_compiled() == before
    assert [name for name, _ in session.model.named_parameters()] == names


@compiler
def test_a_model_that_is_not_compiled_after_all_is_not_passed_off_as_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo  # noqa: F401 - its import warns, under the filter above

    monkeypatch.setattr("pybatch.workloads.session.compiled", nn.Sequential)  # as it was written, inside another
    with pytest.raises(WorkloadError, match=r"captured no graph of workload 'small' at batch 1.*Leave out --compile"):
        measure_capacity(Small(), device="cpu", compile=True, find_max_batch=False)


@compiler
def test_a_compiler_that_fails_is_not_the_losss_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(compiling, "_BACKEND", broken)
    torch.compiler.reset()
    with pytest.raises(WorkloadError, match=r"torch.compile fails on workload 'small' at batch 1: .*no C\+\+ compiler"):
        measure_capacity(Small(), device="cpu", compile=True, find_max_batch=False)


def test_a_mode_has_a_name() -> None:
    names = [Mode(c, g).name for c in (False, True) for g in (False, True)]
    assert names == ["eager", "graph", "compiled", "compiled, graph"]
