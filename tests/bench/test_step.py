"""The step benchmark: every case validates against its peers and gives a row; shapes and byte models are right."""

import argparse
import json
import math

import peers
import pytest
import shapes
import step
import timing
import torch

CPU = torch.device("cpu")
TINY = [(16, 8), (8,), (16, 8), (4, 3, 2, 2)]
CASES = [
    (name, precision, chain)
    for name in step.OPTIMIZERS
    for precision in step.PRECISIONS
    for chain in step.CHAINS
    if step.makers(name, precision, chain) is not None
]


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(timing, "FLUSH_BYTES", 4096)
    monkeypatch.setitem(step.SHAPES, "tiny", TINY)
    return timing.Clock(CPU)


@pytest.mark.parametrize(("name", "precision", "chain"), CASES)
def test_every_case_agrees_with_its_peers_and_gives_a_row(clock, name, precision, chain):
    row = step.measure(step.makers(name, precision, chain)(TINY, CPU), "tiny", clock, repeats=2)
    assert [why for why in row["missing"].values() if why.startswith("not timed")] == []
    assert row["peers"]
    assert all(peer["ratio_low"] <= peer["ratio"] <= peer["ratio_high"] for peer in row["peers"].values())
    json.dumps(row, allow_nan=False)
    assert step.line(row, 1e9)


def test_a_peer_that_does_something_else_is_not_timed(clock, monkeypatch):
    monkeypatch.setattr(peers, "LR", 2e-3)  # of the peers alone
    with pytest.raises(SystemExit, match="no peer agrees with ours"):
        step.measure(step.makers("SGD", "fp32", "clip")(TINY, CPU), "tiny", clock, repeats=2)


def test_our_own_twin_is_no_witness(clock, monkeypatch):
    """On a GPU ours in Triton stands beside ours: where no other side agrees, nothing is timed."""
    made = step.makers("SGD", "fp32", "clip")(TINY, CPU)
    made.sides[step.TWIN] = made.sides["torch fused"]
    monkeypatch.setattr(made, "errors", lambda: {step.TWIN: 0.0, "torch fused": 1.0})
    with pytest.raises(SystemExit, match="no peer agrees with ours"):
        step.measure(made, "tiny", clock, repeats=2)


def test_a_run_is_of_what_matters_first_and_tens_of_millions_on_a_gpu_alone():
    arguments = argparse.Namespace(optimizers=None, precisions=None, chains=None, shapes=None)
    for kind, wanted in (("cpu", False), ("cuda", True)):
        cases = list(step.chosen(arguments, torch.device(kind)))
        assert cases[0][0] == "AdamW"
        assert any(case[3] == "1000 tensors of 100x100" for case in cases) == wanted


def test_a_peer_that_fails_is_reported(clock, monkeypatch):
    class Broken:
        def __init__(self, params):
            pass

        def step(self):
            raise RuntimeError("no kernel image")

    def unmade(params):
        raise TypeError("unexpected keyword")

    others = {"broken": peers.Peer(Broken), "unmade": peers.Peer(unmade), **peers.of_torch("AdamW")}
    monkeypatch.setattr(step, "peers", lambda name, device: (others, {}))
    row = step.measure(step.makers("AdamW", "fp32", "clip")(TINY, CPU), "tiny", clock, repeats=2)
    assert set(row["peers"]) == {"torch fused", "torch foreach"}
    assert row["missing"] == {
        "broken": "not timed: RuntimeError: no kernel image",
        "unmade": "not timed: TypeError: unexpected keyword",
    }


def test_byte_models_are_those_of_the_design():
    clipped = {name: step.our_bytes(name, "fp32", "clip") for name in step.OPTIMIZERS}
    assert clipped == {"SGD": 24, "Adam": 32, "AdamW": 32, "Lion": 24, "LARS": 24, "LAMB": 44, "Muon": 28}
    assert step.our_bytes("AdamW", "fp32", "update") == 28
    assert step.our_bytes("AdamW", "bf16", "clip") == 30
    assert step.our_bytes("LARS", "fp32", "update") == 24  # its norm is taken in any case


def test_architectures_have_the_published_numbers_of_parameters():
    counts = {name: sum(map(math.prod, made)) for name, made in shapes.SHAPES.items()}
    assert counts["ResNet-50"] == 25_557_032
    assert counts["GPT-2 124M"] == 124_439_808
    assert [len(shapes.resnet50()), len(shapes.gpt2())] == [161, 148]
