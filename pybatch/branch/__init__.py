"""The critical batch along a run, by branching from checkpoints."""
