"""Memory of a device: how much there is, how much is left, and the peak of a region."""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_PINNED_BYTES = 64 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def total_bytes() -> int:
    """Memory this process may use on the host: the machine's, or its cgroup's limit where that is lower."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _cgroup_limits())])


def available_bytes(device: torch.device) -> int:
    """Memory this process could still take on the device now, in bytes."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return min([int(psutil.virtual_memory().available), *(limit - used for limit, used in _cgroup_limits())])


def process_bytes(key: str) -> int | None:
    """One figure of this process from /proc/self/status (VmRSS, VmHWM, VmSize), in bytes; None where there is none."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024  # the kernel writes kB and means KiB
    return None


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device, without waiting for what a GPU has still to do.

    From pageable memory CUDA copies only once all work before is done, and the host waits for both. Pinning costs a
    copy on the host, and torch keeps the block for the next of its size: right for what a step uploads, not for
    gigabytes. Memory that is pinned already may be written anew by its owner as soon as this returns: that waits.
    """
    plain = tensor.device.type == "cpu" and tensor.layout is torch.strided and not tensor.requires_grad
    if device.type != "cuda" or not plain or tensor.numel() * tensor.element_size() > _PINNED_BYTES:
        return tensor.to(device)
    return tensor.to(device) if tensor.is_pinned() else tensor.pin_memory().to(device, non_blocking=True)


def release(device: torch.device) -> None:
    """Hand memory that is free inside this process back, so that the next reading sees only what is in use."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif (trim := _malloc_trim()) is not None:
        trim(0)


def keep_freed() -> None:
    """Have this process keep what it frees for itself until `release`, where the C library is glibc.

    glibc gives large blocks back to the system, and each page taken anew is a fault: to fill 74 MB in tensors of 9 MB
    took 42 ms with them and 5 ms without (AMD EPYC in a virtual machine). For processes of pybatch's own: the setting
    can't be taken back.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 2**31 - 1)):  # the largest it takes
        mallopt(parameter, value)


class PeakMemory:
    """Peak memory of regions of work, in bytes above what was in use when this object was made.

    CUDA: memory reserved by torch's allocator. CPU: resident memory of this process, whose high-water mark the kernel
    resets on request (proc(5), clear_refs).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reason: str | None = None  # why there is no figure
        release(device)
        if device.type == "cuda":
            self._baseline = int(torch.cuda.memory_reserved(device))
            return
        self._baseline = process_bytes("VmRSS") or 0
        if process_bytes("VmHWM") is None:
            self.reason = "this system has no /proc/self/status with a peak resident size"
        elif (error := _reset_high_water()) is not None:
            self.reason = f"the kernel does not reset the peak resident size ({error})"

    def rebase(self, held_bytes: int) -> None:
        """Count `held_bytes` as what the work holds now, and the rest of what is in use as the process's own.

        On a CPU the first steps load code and start threads, which resident memory cannot tell from the work's tensors.
        CUDA's allocator counts tensors only and needs no such correction.
        """
        release(self.device)
        if self.device.type == "cpu":
            self._baseline = (process_bytes("VmRSS") or 0) - held_bytes

    def start(self) -> None:
        """Begin a region."""
        release(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.reason is None:
            _reset_high_water()

    def peak(self) -> int | None:
        """Peak since `start`, above the baseline; None for `reason`."""
        if self.device.type == "cuda":
            return max(0, int(torch.cuda.max_memory_reserved(self.device)) - self._baseline)
        high = process_bytes("VmHWM") if self.reason is None else None
        return None if high is None else max(0, high - self._baseline)


def _reset_high_water() -> OSError | None:
    try:
        _CLEAR_REFS.write_text("5")
    except OSError as error:
        return error
    return None


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim  # glibc
    except (OSError, AttributeError):
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int

    def call(pad: int) -> int:
        return int(trim(pad))

    return call


def _cgroup_limits() -> list[tuple[int, int]]:
    """(limit, used) of every cgroup around this process that has a memory limit; page cache is not counted as used."""
    found = []
    for folder in _cgroup_folders():
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _read_int(folder / limit_name), _read_int(folder / used_name)
            if limit is not None and used is not None and limit < 1 << 60:  # cgroup v1 writes "no limit" as ~2**63
                found.append((limit, max(0, used - _file_cache(folder))))
    return found


def _cgroup_folders() -> list[Path]:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = _CGROUP / controllers if controllers else _CGROUP
        folder = root / path.lstrip("/")
        # A container often sees its own cgroup mounted at the root while the path names the host's.
        folders += [f for f in (folder, *folder.parents) if f.is_relative_to(root) and f.is_dir()]
    return folders


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _file_cache(folder: Path) -> int:
    try:
        pairs = dict(line.split()[:2] for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(pairs.get("inactive_file", pairs.get("total_inactive_file", 0)))
