"""The device's measured ceilings: matrix products and memory copies; a datasheet's peak is quoted beside them."""

from __future__ import annotations

import math
import re
import statistics
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
    (r"NVIDIA A100[- ].*", {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12}),
    (r"NVIDIA H100 80GB HBM3", {"bf16": 989.4e12, "fp16": 989.4e12, "fp32": 67e12}),  # SXM
    (r"NVIDIA H100 PCIe", {"bf16": 756e12, "fp16": 756e12, "fp32": 51e12}),
    (r"NVIDIA H200", {"bf16": 989.4e12, "fp16": 989.4e12, "fp32": 67e12}),  # SXM
    (r"NVIDIA L40S", {"bf16": 362.05e12, "fp16": 362.05e12, "fp32": 91.6e12}),
    (r"NVIDIA GeForce RTX 4090", {"bf16": 165.2e12, "fp16": 165.2e12, "fp32": 82.6e12}),
    (r"NVIDIA B200", {"bf16": 2250e12, "fp16": 2250e12}),
)

WINDOW_S = 0.25  # of a ceiling; of windows of 15 ms the best is 5 to 10 % faster than steps can run


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
        dtype: "fp32", "bf16" or "fp16", of the matrix product.
        time_budget_s: seconds to spend; the copy takes about a third of them.

    The product is square, of random data (zeros run faster), as large as the budget allows. The copy's arrays are at
    least four times the last-level cache. Both figures are the best of the medians of successive windows, so that a
    passing disturbance does not lower a ceiling; a window lasts as long as the measurement of
    a step does, so that a burst does not raise it above what a step could reach.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return Ceilings(
        gemm_flops=_gemm(device, DTYPES[dtype], time_budget_s * 2 / 3),
        copy_bytes_per_s=_copy(device, time_budget_s / 3),
        datasheet_flops=datasheet_flops(name, dtype),
    )


def _gemm(device: torch.device, dtype: torch.dtype, budget: float) -> float:
    deadline = time.perf_counter() + budget
    sizes: list[tuple[int, float]] = []  # edges and the seconds of one product
    while True:
        edge = 512 << len(sizes)
        sizes.append((edge, _median(device, _product(device, dtype, edge), 3)))
        # A product of twice the edge is 8 times the work: go on while a few windows of it fit.
        if edge == 16384 or sizes[-1][1] * 8 * 12 > deadline - time.perf_counter():
            break
    # The rate of short products is a burst's: what counts is measured over whole windows, at the two largest sizes.
    rates: list[float] = []
    for left, (edge, _) in zip((2, 1), sizes[:-3:-1], strict=False):
        share = max((deadline - time.perf_counter()) / left, min(WINDOW_S, budget))  # one window at least
        rates.append(2 * edge**3 / best_median(device, _product(device, dtype, edge), share))
    return max(rates)


def _product(device: torch.device, dtype: torch.dtype, edge: int) -> Callable[[], object]:
    a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    return partial(torch.mm, a, b, out=torch.empty_like(a))


def _copy(device: torch.device, budget: float) -> float | None:
    deadline = time.perf_counter() + budget
    wanted = max(4 * last_level_cache_bytes(device), 256 << 20 if device.type == "cuda" else 64 << 20)
    if 3 * wanted > memory.available_bytes(device):
        return None
    source = torch.randn(wanted // 4, device=device)
    target = torch.empty_like(source)
    left = max(deadline - time.perf_counter(), min(WINDOW_S, budget))  # making the arrays may have taken it all
    seconds = best_median(device, lambda: target.copy_(source), left)
    return 2 * 4 * source.numel() / seconds  # read and written


def best_median(device: torch.device, work: Callable[[], object], budget: float) -> float:
    """Seconds of one call: the smallest of the medians of windows of WINDOW_S, as many as fit the budget in seconds."""
    deadline = time.perf_counter() + budget
    calls = max(3, math.ceil(min(WINDOW_S, budget) / _median(device, work, 3)))
    medians: list[float] = []
    while not medians or time.perf_counter() < deadline:
        medians.append(_median(device, work, calls))
    return min(medians)


def _median(device: torch.device, work: Callable[[], object], calls: int) -> float:
    """Median seconds of so many calls, after one that warms up."""
    clock = clock_for(device)
    clock.time(work, 1)
    return statistics.median(clock.time(work, calls))
