"""Generators are seeded as by torch, put back, and nothing is kept of it."""

import traceback

import pytest
import torch

from pybatch.device.generators import forked, seed_all, seed_generators, seeded

CPU = torch.device("cpu")


@pytest.mark.parametrize("seeding", [seed_all, lambda seed: seed_generators(seed, CPU)])
def test_it_seeds_as_torch_does(seeding):
    with forked(CPU):
        torch.manual_seed(5)
        expected = torch.rand(4)
        seeding(5)
        assert torch.equal(torch.rand(4), expected)


def test_no_stack_is_printed_for_devices_that_are_not_in_use(monkeypatch):
    def fail(*_, **__):
        pytest.fail("a stack was printed")

    monkeypatch.setattr(traceback, "format_stack", fail)
    with seeded(5, CPU):
        pass
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with forked(CPU):
        seed_all(5)


@pytest.mark.parametrize("begun", [False, True])
def test_a_gpu_that_a_model_is_the_first_to_use_is_seeded_as_any(monkeypatch, begun):
    seeded_there = []
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: begun)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded_there.append)  # by torch.manual_seed too
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    with forked(CPU):
        seed_all(5)
    assert seeded_there == [5]


def test_the_generator_is_put_back_also_after_an_error():
    state = torch.get_rng_state()
    try:
        with seeded(5, CPU):
            torch.rand(3)
            raise ValueError
    except ValueError:
        pass
    assert torch.equal(torch.get_rng_state(), state)
