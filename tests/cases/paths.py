"""Where things are, for tests that read sources or start processes of their own."""

from pathlib import Path

TESTS = Path(__file__).parents[1]  # on the path of every test; processes of their own get it as PYTHONPATH
ROOT = TESTS.parent
