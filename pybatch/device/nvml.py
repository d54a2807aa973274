"""NVIDIA's management library, through `nvidia-ml-py`; absent or refused calls become a reason, never an error."""

from __future__ import annotations

import functools
from typing import Any

import torch


def library() -> Any | str:
    """The started `pynvml` module, or the reason why it cannot be used."""
    return _started()


@functools.cache
def _started() -> Any | str:
    try:
        import pynvml
    except ImportError:
        return "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"NVML does not start: {error}"
    return pynvml


def driver_version() -> str | None:
    """Version of the NVIDIA driver, or None where there is none."""
    nvml = library()
    if isinstance(nvml, str):
        return None
    try:
        version = nvml.nvmlSystemGetDriverVersion()
    except nvml.NVMLError:
        return None
    return version.decode() if isinstance(version, bytes) else str(version)


def handle(device: torch.device) -> Any | str:
    """NVML's handle of a torch device, matched by UUID (indices differ under CUDA_VISIBLE_DEVICES), or the reason."""
    nvml = library()
    if isinstance(nvml, str):
        return nvml
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if uuid is None:
        return "this torch does not tell the GPU's UUID"
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError as error:
        return f"NVML does not know GPU-{uuid}: {error}"
