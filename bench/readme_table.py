"""The table of docs/optimizers.md, from the results that bench/step.py wrote.

python bench/readme_table.py bench/results/<device>.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PEERS = ("torch fused", "torch foreach", "optimi")
NAMES = {"torch": "torch foreach"}  # Muon's twin has one implementation


def shown(result: dict[str, Any]) -> bool:
    """The page shows fp32 with clipping for all, and AdamW's other chains, without the scaler."""
    clipped = result["precision"] == "fp32" and result["chain"] == "clip"
    return clipped or (result["optimizer"] == "AdamW" and result["chain"] in ("clip", "update", NOISE))


NOISE = "2 micro-batches + clip; ours with noise"


def row(result: dict[str, Any]) -> str:
    """One case: our median, the share of the ceiling, and each peer's time over ours."""
    found = {NAMES.get(name, name): peer for name, peer in result["peers"].items()}
    peers = [found.get(name) for name in PEERS]
    cells = ["–" if p is None else f"{p['ratio']:.2f}× [{p['ratio_low']:.2f}, {p['ratio_high']:.2f}]" for p in peers]
    what = f"{result['optimizer']} {result['precision']}, {result['chain']}"
    return f"| {what} | {result['shapes']} | {result['ours_ms']:.1f} ms | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    results = json.loads(Path(sys.argv[1]).read_text())["results"]
    print(f"| work | tensors | pybatch | {' | '.join(PEERS)} |")
    print("|---|---|--:|" + "--:|" * len(PEERS))
    for result in filter(shown, results):
        print(row(result))


if __name__ == "__main__":
    main()
