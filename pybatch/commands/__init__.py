"""What the commands of the command line do, one file each; `pybatch.cli` puts them together."""
