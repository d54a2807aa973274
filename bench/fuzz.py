"""Draw hostile records, stores, trajectories, command lines and optimizer sequences, and count what goes wrong.

    python bench/fuzz.py --minutes 30 [--seed 0]

Every trial is a seed of its kind, printed where it fails: `kind(random.Random(seed), folder)` makes it again. What each
kind draws is in tests/cases/hostile.py; tests/commands/test_hostile.py draws a few of each.
"""

import argparse
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from cases import hostile, hostile_updates, sweeps


def kinds(folder):
    """What is drawn, by name."""
    store = folder / "base.db"
    sweeps.measure(store=store, batches=[4, 8], rates=[0.1, 0.2], seeds=1)
    return {
        "records": hostile.records,
        "trajectories": hostile.trajectories,
        "stores": lambda rng, folder: hostile.stores(rng, folder, store),
        "resumed stores": lambda rng, folder: hostile.resumed(rng, folder, store),
        "logs": hostile.logs,
        "command lines": hostile.commands,
        "optimizer sequences": hostile_updates.sequences,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        drawn = kinds(folder)
        trials, failures, seconds = (dict.fromkeys(drawn, 0) for _ in range(3))
        end = time.monotonic() + 60 * asked.minutes
        while time.monotonic() < end:
            kind = min(drawn, key=lambda kind: seconds[kind])  # the same time for each
            seed, begin = asked.seed + trials[kind], time.monotonic()
            found = drawn[kind](random.Random(seed), folder)
            seconds[kind] += time.monotonic() - begin
            trials[kind] += 1
            if found is not None:
                failures[kind] += 1
                print(f"{kind}, random.Random({seed}): {found}", file=sys.stderr)
    print("| kind | trials | failures |\n|---|--:|--:|")
    for kind in drawn:
        print(f"| {kind} | {trials[kind]:,} | {failures[kind]} |")
    sys.exit(bool(sum(failures.values())))


if __name__ == "__main__":
    main()
