"""The table of README's optimizer section, from the results that bench/step.py wrote.

python bench/readme_table.py bench/results/<device>.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PEERS = ("torch fused", "torch foreach", "optimi")


def row(result: dict[str, Any]) -> str:
    """One case: our median, the share of the ceiling, and each peer's time over ours."""
    peers = [result["peers"].get(name) for name in PEERS]
    cells = ["–" if p is None else f"{p['ratio']:.2f}× [{p['ratio_low']:.2f}, {p['ratio_high']:.2f}]" for p in peers]
    what = f"{result['optimizer']} {result['precision']}, {result['chain']}"
    return f"| {what} | {result['shapes']} | {result['ours_ms']:.1f} ms | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    results = json.loads(Path(sys.argv[1]).read_text())["results"]
    print(f"| work | tensors | pybatch | {' | '.join(PEERS)} |")
    print("|---|---|--:|" + "--:|" * len(PEERS))
    for result in results:
        print(row(result))


if __name__ == "__main__":
    main()
