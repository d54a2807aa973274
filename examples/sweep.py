"""The measured critical batch: steps to a loss target at several batch sizes, under two learning-rate rules.

python examples/sweep.py --store runs.db        # killed and started again, only what is missing runs
pybatch report runs.db -o report.html
"""

import argparse

import pybatch
from pybatch.workloads.digits import Digits


def main() -> None:
    """Train, fit, and print the critical batch of each rule; then what it means beside this device's capacity."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--store")
    parser.add_argument("--largest", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()

    batches = [b for b in (8, 32, 128, 512) if b <= given.largest]
    found = pybatch.measure_convergence(
        Digits(),
        batches,
        ["tuned", "sqrt"],
        given.seeds,
        store=given.store,
        resume=given.store is not None,
        target={"train": 0.3},
    )
    for curve in found.curves:
        print(f"{curve.rule}, {curve.split} loss {curve.target}:")
        for point in curve.points:
            print(f"  batch {point.batch:4}: {point.steps} steps at rate {point.learning_rate}")
        print(f"  critical batch {curve.critical_batch} [{curve.low}, {curve.high}]")


if __name__ == "__main__":
    main()
