"""Processor time of the host's part of a clipped step over many small tensors.

python bench/host_time.py --tensors 1000

Tensors of two elements, so that their arithmetic is next to nothing. Every part is timed in turn with the others, one
thread, processor time; the least and the median of the rounds are given, and the ratio to torch's `_init_group`, which
gathers the same tensors in every step of torch's own AdamW: a machine in use by others slows both alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from pybatch import optim

CHAIN = "torch's clip and step, foreach"
STEP, PASS = "step, clipped", "  the core's pass"


def parts(count: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name; each call is one step's worth."""
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(count)]
    for p in params:
        p.grad = torch.ones(2)
    own = optim.AdamW(params, max_grad_norm=1.0)
    own.step()
    tables = own._tables
    assert tables is not None
    twins = [torch.nn.Parameter(torch.ones(2)) for _ in range(count)]
    for p in twins:
        p.grad = torch.ones(2)
    theirs = torch.optim.AdamW(twins, foreach=True)
    theirs.step()
    lists: list[list[torch.Tensor]] = [[] for _ in range(6)]

    def init_group() -> None:
        for one in lists:
            one.clear()
        theirs._init_group(theirs.param_groups[0], *lists)  # type: ignore[no-untyped-call]

    def chain() -> None:
        torch.nn.utils.clip_grad_norm_(twins, 1.0, foreach=True)
        theirs.step()

    return {
        "torch's _init_group": init_group,
        CHAIN: chain,
        STEP: own.step,
        "  do the tensors still stand": lambda: tables.stands(own.param_groups, own.state),
        "  gradients": tables.gradients,
        PASS: lambda: tables.backend.step(tables.first, own._call),
        "  torch's count of writes": lambda: torch.autograd.graph.increment_version(params),
    }


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    timed = parts(options.tensors)
    took: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(options.rounds):
        for name, work in timed.items():
            work()
            calls = 1 if name == CHAIN else 5  # it takes as long as all the others
            began = time.process_time()
            for _ in range(calls):
                work()
            took[name].append((time.process_time() - began) / calls * 1e3)
    base = took["torch's _init_group"]
    print(f"{options.tensors} tensors, ms of processor time{'':14} least   median   of _init_group")
    for name, times in took.items():
        ratio = statistics.median(t / b for t, b in zip(times, base, strict=True))
        print(f"{name:42} {min(times):9.3f} {statistics.median(times):8.3f} {ratio:10.2f}")
    least, median = (of(took[STEP]) - of(took[PASS]) for of in (min, statistics.median))
    print(f"{'  all but that pass':42} {least:9.3f} {median:8.3f}")


if __name__ == "__main__":
    main()
