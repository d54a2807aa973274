"""Identity, memory, ceilings, clocks, counters, environment."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pybatch.base.errors import DeviceError, UsageError
from pybatch.device import ceilings, environment, identity, memory
from pybatch.device.clock import WallClock, clock_for
from pybatch.device.precision import full_fp32

CPU = torch.device("cpu")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@no_gpu
def test_without_a_gpu_the_default_is_the_cpu() -> None:
    assert identity.resolve(None) == CPU
    assert identity.resolve("cpu") == CPU


@no_gpu
@pytest.mark.parametrize("request_", ["cuda", "cuda:1", "1", 0, torch.device("cuda", 3)])
def test_a_missing_gpu_is_an_error_that_names_the_cause_and_the_remedy(request_: object) -> None:
    with pytest.raises(DeviceError, match=r"GPU \d was asked for, but .*--cpu"):
        identity.resolve(request_)  # type: ignore[arg-type]


def test_an_index_out_of_range_names_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert identity.resolve("1") == torch.device("cuda", 1)
    with pytest.raises(DeviceError, match=r"the GPUs here are 0\.\.1"):
        identity.resolve("cuda:2")


@pytest.mark.parametrize("request_", ["gpu", "mps", "cuda:x", -1])
def test_an_unknown_device_is_a_usage_error_with_the_users_value(request_: object) -> None:
    with pytest.raises(UsageError, match=str(request_)):
        identity.resolve(request_)  # type: ignore[arg-type]


def test_the_cpu_is_described_within_what_this_process_may_use() -> None:
    device = identity.describe(CPU)
    assert device.kind == "cpu"
    assert device.name
    assert device.cores is not None
    assert 1 <= device.cores <= len(os.sched_getaffinity(0))
    assert device.memory_bytes is not None
    assert memory.available_bytes(CPU) <= device.memory_bytes


@pytest.mark.parametrize(
    ("size", "pinned", "grad", "kind", "steps"),
    [
        (8, False, False, "cuda", ["pin", "to cuda, not waiting"]),
        (8, True, False, "cuda", ["to cuda, waiting"]),  # its owner may write it anew at once
        (8, False, True, "cuda", ["to cuda, waiting"]),
        (64 << 20, False, False, "cuda", ["to cuda, waiting"]),
        (8, False, False, "cpu", ["to cpu, waiting"]),
    ],
)
def test_what_a_step_uploads_does_not_wait_for_the_steps_before(
    size: int, pinned: bool, grad: bool, kind: str, steps: list[str]
) -> None:
    done: list[str] = []

    class Fake:
        device, layout, requires_grad = CPU, torch.strided, grad

        def numel(self) -> int:
            return size

        def element_size(self) -> int:
            return 4

        def is_pinned(self) -> bool:
            return pinned

        def pin_memory(self) -> Fake:
            done.append("pin")
            return self

        def to(self, device: torch.device, non_blocking: bool = False) -> Fake:
            done.append(f"to {device.type}, {'not ' if non_blocking else ''}waiting")
            return self

    memory.upload(Fake(), torch.device(kind))  # type: ignore[arg-type]
    assert done == steps


def test_a_cgroup_limit_lowers_total_and_available_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in (("max", 1000), ("current", 700)):
        (tmp_path / f"memory.{name}").write_text(str(value))
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 100\n")
    monkeypatch.setattr(memory, "_cgroup_folders", lambda: [tmp_path])
    assert memory.total_bytes() == 1000
    assert memory.available_bytes(CPU) == 1000 - (700 - 100)  # page cache can be taken back
    (tmp_path / "memory.max").write_text("max")
    assert memory.total_bytes() > 1 << 20


@pytest.mark.parametrize(("text", "cores"), [("150000 100000", 2), ("50000 100000", 1)])
def test_a_cpu_quota_lowers_the_usable_cores(monkeypatch: pytest.MonkeyPatch, text: str, cores: int) -> None:
    quota, period = map(int, text.split())
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(identity, "_cpu_quota", lambda: quota / period)
    assert identity.usable_cores() == cores


def test_peak_memory_sees_what_was_freed_before_it_was_read() -> None:
    size = 96 << 20
    meter = memory.PeakMemory(CPU)
    if meter.reason is not None:
        pytest.skip(meter.reason)
    meter.start()
    block = torch.ones(size // 4)
    del block
    peak = meter.peak()
    assert peak is not None
    assert size * 0.98 <= peak <= size * 1.2
    meter.start()
    assert (meter.peak() or 0) < size / 4  # a new region forgets the old peak
    held = torch.ones(size // 4)
    meter.rebase(held.nbytes)
    meter.start()
    assert meter.peak() == pytest.approx(size, rel=0.05)  # what is held counts, the rest is the process's


def test_peak_memory_tells_why_it_has_no_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    meter = memory.PeakMemory(CPU)
    assert meter.peak() is None
    assert meter.reason is not None
    assert "peak resident size" in meter.reason


@pytest.mark.parametrize(
    ("name", "dtype", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H200", "fp32", 67e12),
        ("NVIDIA H200 NVL", "bf16", None),  # another clock than the SXM part
        ("NVIDIA A1000", "bf16", None),
        ("", "fp32", None),
    ],
)
def test_datasheet_peaks_are_dense_and_unknown_devices_have_none(name: str, dtype: str, flops: float | None) -> None:
    assert ceilings.datasheet_flops(name, dtype) == flops


def test_no_fp32_peak_is_quoted_under_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert ceilings.datasheet_flops("NVIDIA H200", "fp32") is None
    assert ceilings.datasheet_flops("NVIDIA H200", "bf16") is not None


def test_ceilings_are_work_over_the_best_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "last_level_cache_bytes", lambda device: 1 << 20)
    windows = iter([1.0] * 6 + [2.0] * 2)  # warming up, scouting and the first windows are slow

    class Planted(WallClock):
        def time(self, work: object, count: int) -> list[float]:
            return [next(windows, 0.25)] * count

    monkeypatch.setattr(ceilings, "clock_for", lambda device: Planted())
    found = ceilings.measure_ceilings(CPU, "fp32", 0.02)
    assert found.gemm_flops == 2 * 512**3 / 0.25
    assert found.copy_bytes_per_s == 2 * (64 << 20) / 0.25
    assert found.datasheet_flops is None


def test_a_burst_is_not_a_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "last_level_cache_bytes", lambda device: 1 << 20)

    class Bursting(WallClock):
        """Twice as fast in the first calls after each rest."""

        def time(self, work: object, count: int) -> list[float]:
            return [0.01 if i < 5 else 0.02 for i in range(count)]

    monkeypatch.setattr(ceilings, "clock_for", lambda device: Bursting())
    found = ceilings.measure_ceilings(CPU, "fp32", 0.6)
    assert found.gemm_flops == 2 * 512**3 / 0.02  # the scouts of 3 calls are all burst; a window holds 25
    assert found.copy_bytes_per_s == 2 * (64 << 20) / 0.02


@pytest.mark.isa
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ceilings_of_this_machine_are_plausible(dtype: str) -> None:
    found = ceilings.measure_ceilings(CPU, dtype, 0.2)
    assert found.gemm_flops is not None
    assert 1e8 < found.gemm_flops < 1e15
    assert found.copy_bytes_per_s is None or 1e8 < found.copy_bytes_per_s < 1e13


def test_the_wall_clock_gives_one_time_per_call() -> None:
    calls: list[float] = []
    clock = clock_for(CPU)
    times = clock.time(lambda: (time.sleep(0.002), calls.append(0.0)), 4)
    assert len(times) == len(calls) == 4
    assert min(times) >= 0.002
    assert clock.host_bound(lambda: None, 1.0) is None
    assert clock.host_bound_reason


def _git(folder: Path, *arguments: str) -> str:
    identity_ = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(["git", *identity_, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_environment_names_the_commit_and_whether_it_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert environment.capture(1, "c").commit is None
    _git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    _git(tmp_path, "add", "a")
    _git(tmp_path, "commit", "-q", "-m", "a")
    head = _git(tmp_path, "rev-parse", "HEAD")
    assert environment.capture(1, "c").commit == head
    (tmp_path / "a").write_text("2")
    found = environment.capture(7, "pybatch bench")
    assert found.commit == f"{head}-dirty"
    assert (found.seed, found.command, found.threads) == (7, "pybatch bench", torch.get_num_threads())
    assert found.torch == torch.__version__
    assert "numpy" in found.libraries


def test_memory_that_is_kept_stays_with_the_process_until_it_is_released():
    text = """
import ctypes, torch
from pybatch.device.precision import full_fp32
from pybatch.device.memory import keep_freed, process_bytes, release
{}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
before, size = process_bytes("VmRSS"), 20 << 20
block = libc.malloc(size)
libc.memset(block, 1, size)
libc.free(block)
print((process_bytes("VmRSS") - before) / size)
release(torch.device("cpu"))
print((process_bytes("VmRSS") - before) / size)
"""
    shares = []
    for line in ("", "keep_freed()"):
        done = subprocess.run([sys.executable, "-c", text.format(line)], capture_output=True, text=True, check=True)
        shares.append([float(share) for share in done.stdout.split()])
    if shares[0][0] > 0.5:
        pytest.skip("this C library keeps what is freed by itself")
    (_, _), (kept, released) = shares
    assert kept > 0.9
    assert released < 0.5


def test_full_fp32_leaves_the_settings_as_they_were() -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def settings() -> list[object]:
        return [place.fp32_precision for place in (cudnn.conv, cudnn.rnn, matmul)]  # type: ignore[attr-defined]

    def older() -> list[object]:
        return [cudnn.allow_tf32, matmul.allow_tf32, torch.get_float32_matmul_precision()]

    before = settings(), older()
    with full_fp32():
        assert settings() == ["ieee"] * 3
    assert (settings(), older()) == before
