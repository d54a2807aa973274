"""Which device a run is on, and what it is."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

import psutil
import torch

from pybatch.base.errors import DeviceError, UsageError
from pybatch.device import memory
from pybatch.records import Device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # in which a workload can run


def resolve(request: str | int | torch.device | None = None) -> torch.device:
    """The device asked for: "cpu", "cuda:1", a GPU's index ("1"), or None for GPU 0 if there is one, else the CPU.

    Raises:
        UsageError: the request is not one of these forms.
        DeviceError: there is no such GPU; says why and names `--cpu`.
    """
    if request is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    text = str(request).strip()
    try:
        device = torch.device("cuda", int(text)) if text.lstrip("+-").isdigit() else torch.device(text)
    except RuntimeError:
        raise UsageError(f"device {request!r} is not known. Use 'cpu', 'cuda:0' or the index of a GPU.") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UsageError(f"device {request!r} is not supported. Use 'cpu', 'cuda:0' or the index of a GPU.")
    index = device.index or 0
    reason = missing(index)
    if reason is not None:
        raise DeviceError(
            f"GPU {index} was asked for, but {reason}. To measure this machine's CPU use --cpu (device='cpu')."
        )
    return torch.device("cuda", index)


def describe(device: torch.device) -> Device:
    """What the device is; a CPU's cores and memory are those this process may use."""
    if device.type == "cuda":
        index = device.index or 0
        properties = torch.cuda.get_device_properties(index)
        uuid = getattr(properties, "uuid", None)
        return Device(
            kind="cuda",
            index=index,
            name=properties.name,
            memory_bytes=int(properties.total_memory),
            cores=int(properties.multi_processor_count),
            uuid=f"GPU-{uuid}" if uuid is not None else None,  # NVML's spelling
            capability=f"{properties.major}.{properties.minor}",
        )
    return Device(
        kind="cpu",
        index=0,
        name=cpu_name(),
        memory_bytes=memory.total_bytes(),
        cores=usable_cores(),
        capability=torch.backends.cpu.get_cpu_capability(),
    )


def usable_cores() -> int:
    """Cores this process may use: by affinity, and by its cgroup's quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1
    quota = _cpu_quota()
    return affinity if quota is None else max(1, min(affinity, math.ceil(quota)))


def cpu_name() -> str:
    """The CPU's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def last_level_cache_bytes(device: torch.device) -> int:
    """Size of the device's last-level cache; 32 MiB where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1))
    return max(sizes, default=32 << 20)


def missing(index: int) -> str | None:
    """Why there is no GPU of this index, or None when there is."""
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return f"this torch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return "no NVIDIA driver or no GPU is visible to this process (see nvidia-smi and CUDA_VISIBLE_DEVICES)"
    count = torch.cuda.device_count()
    return None if 0 <= index < count else f"the GPUs here are 0..{count - 1}"


def _cpu_quota() -> float | None:
    for folder in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/cpu")):
        try:
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{part}_us").read_text() for part in ("quota", "period"))
            return None if quota.strip() in ("max", "-1") else int(quota) / int(period)
        except (OSError, ValueError):
            continue
    return None
