"""`python -m pybatch` is the `pybatch` command."""

from pybatch.cli import main

main()
