"""How steps are run: after a rest and sustained, replayed as CUDA graphs, compiled."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases.planted import CPU, NoMemory, PlantedClock, Small, measure
from torch import nn

from pybatch.base.errors import UsageError, WorkloadError
from pybatch.capacity import measurement, modes
from pybatch.capacity.burst import BURST_STEPS, Settling
from pybatch.capacity.exploration import Explorer, explore_given
from pybatch.capacity.measurement import measure_capacity
from pybatch.capacity.modes import GraphedStep, Mode
from pybatch.capacity.step import TrainingStep
from pybatch.capacity.stopping import StoppingRule
from pybatch.capacity.timing import Rounds
from pybatch.device.clock import WallClock
from pybatch.records import Ceilings
from pybatch.workloads.running import compiling
from pybatch.workloads.running.session import Session

# Importing torch's compiler warns of itself.
compiler = pytest.mark.filterwarnings("default::DeprecationWarning:torch")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")

# Burst and sustained.


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
            graph=lambda graph, stream: self._inside(f"capture on {stream.name}", graph.work),
        )
        monkeypatch.setattr(modes, "cuda", cuda)
        return self

    def did(self, what: str) -> None:
        self.events.append(f"{self.where}: {what}")
        if self.where.startswith("capture"):
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
        if self.error is not None and self.cuda.where.startswith("capture"):
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
    captured = ["capture on side: backward", "replay backward", "main: update", "capture on side: update"]
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
    assert cuda.events[-4:] == ["main: update", "capture on side: update", "replay backward", "replay update"]


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
    region = SimpleNamespace(
        device=CPU,
        start=lambda: None,
        look=lambda: None,
        stop=lambda: None,
        estimated=lambda reading, *rest: reading,
    )
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

    monkeypatch.setattr(
        "pybatch.workloads.running.session.compiled", nn.Sequential
    )  # as it was written, inside another
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
