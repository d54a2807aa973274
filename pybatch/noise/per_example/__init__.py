"""Exact per-example gradient norms from one ordinary backward pass, without forming per-example gradients."""

from pybatch.noise.per_example.recorder import ExampleNorms as ExampleNorms
from pybatch.noise.per_example.recorder import ExampleRecorder as ExampleRecorder
