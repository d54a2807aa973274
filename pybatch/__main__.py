"""The `pybatch` command: installed under that name, or as `python -m pybatch`."""

from __future__ import annotations

import sys

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main() -> None:
    """Run the command line. Ctrl-C while it is imported ends as it does later, without Python's trace."""
    try:
        from pybatch.cli import main as run

        run()
    except KeyboardInterrupt:
        print("pybatch: interrupted before anything was measured; nothing was written", file=sys.stderr)
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
