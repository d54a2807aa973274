"""What an optimizer keeps lies in memory that was asked for in huge pages, where the kernel knows them."""

import mmap
import re
from pathlib import Path

import pytest
import torch
from cases.problem import same_bits

from pybatch import ops, optim
from pybatch.ops import pages

pytestmark = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages on request"
)
LARGE, SMALL = 5 << 20, 1000  # elements: at least nine whole pages of 2 MB, none


def is_asked_for(tensor):
    """Whether the kernel was asked for huge pages in the middle of the tensor ("hg", proc(5))."""
    place = tensor.data_ptr() + tensor.nbytes // 2
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if area := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(area[1], 16) <= place < int(area[2], 16)
        elif here and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("the tensor lies in no area")


def test_states_and_masters_of_large_parameters_lie_in_huge_pages():
    params = [torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for n in (LARGE, SMALL)]
    opt = optim.AdamW(params, lr=0.0, weight_decay=0.0, master_weights=True)
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    for name in ("exp_avg", "exp_avg_sq", "master"):
        assert is_asked_for(opt.state[params[0]][name])


def test_the_tensor_is_as_torchs():
    like = torch.ones(LARGE // 5, 5).t()
    made = ops.zeros_like(like, torch.bfloat16)
    assert same_bits([made], [torch.zeros_like(like, dtype=torch.bfloat16)])
    assert made.stride() == like.stride()
    assert ops.empty_like(torch.ones(0)).shape == (0,)


def test_memory_beside_the_tensor_is_left_alone(monkeypatch):
    """Whole pages inside it alone: what shares its first and last belongs to others."""
    asked, page = [], 2 << 20

    class Kernel:
        def madvise(self, first, size, advice):
            asked.append((first.value, size.value, advice))

    monkeypatch.setattr(pages, "_libc", Kernel())
    made = pages.empty_like(torch.empty(LARGE))
    ((first, size, advice),) = asked
    begin, end = made.data_ptr(), made.data_ptr() + made.nbytes
    assert (first % page, size % page, advice) == (0, 0, mmap.MADV_HUGEPAGE)
    assert begin <= first < begin + page
    assert end - page < first + size <= end
    pages.empty_like(torch.empty(SMALL))
    pages.empty_like(torch.empty(0))
    assert len(asked) == 1
