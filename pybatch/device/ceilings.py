"""The device's measured ceilings: matrix products and memory copies; a datasheet's peak is quoted beside them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial

import torch

from pybatch.device import memory
from pybatch.device.clock import clock_for
from pybatch.device.identity import DTYPES, last_level_cache_bytes
from pybatch.records import Ceilings

# Dense peak FLOP/s, {dtype: rate}, fp32 without TF32. From NVIDIA's datasheets: A100 (2021), H100 (2023), H200 (2024),
# L40S (2023), HGX B200 (2024; its bf16 with sparsity, halved), and the Ada architecture whitepaper v1.1 (RTX 4090).
_DATASHEET: tuple[tuple[str, dict[str, float]], ...] = (
    (r"NVIDIA A100[- ].*", {"bf16": 312e12, "fp32": 19.5e12}),
    (r"NVIDIA H100 80GB HBM3", {"bf16": 989.4e12, "fp32": 67e12}),  # SXM
    (r"NVIDIA H100 PCIe", {"bf16": 756e12, "fp32": 51e12}),
    (r"NVIDIA H200", {"bf16": 989.4e12, "fp32": 67e12}),  # SXM
    (r"NVIDIA L40S", {"bf16": 362.05e12, "fp32": 91.6e12}),
    (r"NVIDIA GeForce RTX 4090", {"bf16": 165.2e12, "fp32": 82.6e12}),
    (r"NVIDIA B200", {"bf16": 2250e12}),
)


def datasheet_flops(name: str, dtype: str) -> float | None:
    """Dense peak of a GPU's datasheet, FLOP/s; None for a device that is not in the table.

    An fp32 peak is quoted only while TF32 is off, since TF32 products run on other units.
    """
    if dtype == "fp32" and torch.get_float32_matmul_precision() != "highest":
        return None
    for pattern, rates in _DATASHEET:
        if re.fullmatch(pattern, name):
            return rates.get(dtype)
    return None


def measure_ceilings(device: torch.device, dtype: str = "fp32", time_budget_s: float = 3.0) -> Ceilings:
    """Measure the device's roofs at torch's present thread count.

    Args:
        device: what to measure.
        dtype: "fp32" or "bf16", of the matrix product.
        time_budget_s: seconds to spend; the copy takes about a third of them.

    The product is square, of random data (zeros run faster), as large as the budget allows. The copy's arrays are at
    least four times the last-level cache. Both figures are the best of the medians of successive windows, so that a
    passing disturbance does not lower a ceiling (MEASURING, "Ceilings").
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return Ceilings(
        gemm_flops=_gemm(device, DTYPES[dtype], time_budget_s * 2 / 3),
        copy_bytes_per_s=_copy(device, time_budget_s / 3),
        datasheet_flops=datasheet_flops(name, dtype),
    )


def _gemm(device: torch.device, dtype: torch.dtype, budget: float) -> float:
    deadline = time.perf_counter() + budget
    best, edge = 0.0, 512
    while True:
        a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        work = partial(torch.mm, a, b, out=out)
        quick = _best_median(device, work, 0.0)
        left = deadline - time.perf_counter()
        # A product of twice the edge is 8 times the work: go on while a few windows of it fit.
        if edge == 16384 or quick * 8 * 12 > left:
            return max(best, 2 * edge**3 / min(quick, _best_median(device, work, left)))
        best, edge = max(best, 2 * edge**3 / quick), 2 * edge


def _copy(device: torch.device, budget: float) -> float | None:
    deadline = time.perf_counter() + budget
    wanted = max(4 * last_level_cache_bytes(device), 256 << 20 if device.type == "cuda" else 64 << 20)
    if 3 * wanted > memory.available_bytes(device):
        return None
    source = torch.randn(wanted // 4, device=device)
    target = torch.empty_like(source)
    seconds = _best_median(device, lambda: target.copy_(source), deadline - time.perf_counter())
    return 2 * 4 * source.numel() / seconds  # read and written


def _best_median(device: torch.device, work: Callable[[], object], budget: float) -> float:
    """Seconds of one call: the smallest of the medians over windows of three calls, within the budget."""
    clock = clock_for(device)
    deadline = time.perf_counter() + budget
    clock.time(work, 1)
    medians: list[float] = []
    while not medians or time.perf_counter() < deadline:
        medians.append(sorted(clock.time(work, 3))[1])
    return min(medians)
