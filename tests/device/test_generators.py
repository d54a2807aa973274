"""Generators are seeded as by torch, put back, and nothing is kept of it."""

import traceback

import pytest
import torch

from pybatch.device.generators import forked, seed_generators, seeded

CPU = torch.device("cpu")


def test_it_seeds_as_torch_does():
    with forked(CPU):
        torch.manual_seed(5)
        expected = torch.rand(4)
        seed_generators(5, CPU)
        assert torch.equal(torch.rand(4), expected)


def test_no_stack_is_printed_for_devices_that_are_not_in_use(monkeypatch):
    def fail(*_, **__):
        pytest.fail("a stack was printed")

    monkeypatch.setattr(traceback, "format_stack", fail)
    with seeded(5, CPU):
        pass


def test_the_generator_is_put_back_also_after_an_error():
    state = torch.get_rng_state()
    try:
        with seeded(5, CPU):
            torch.rand(3)
            raise ValueError
    except ValueError:
        pass
    assert torch.equal(torch.get_rng_state(), state)
