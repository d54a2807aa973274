"""The device code itself, as nvcc emits it for compute_90, on an emulator that finds races, wrong addresses and parted
barriers, against the C++ core.

A sample: every rule in three scenarios, each time in another storage. bench/ptx.py runs all of them.
"""

import pytest
from cases import lists, ptx
from cases.problem import same_bits

from pybatch import ops

STORAGES = sorted(ops.STORAGES)
SCENARIOS = list(ptx.SCENARIOS)
SAMPLE = [
    (rule, STORAGES[(3 * i + j) % len(STORAGES)], SCENARIOS[(i + 2 * j) % len(SCENARIOS)])
    for i, rule in enumerate(lists.RULES)
    for j in range(3)
]


NARROW = {"Adan": "float32", "Lamb": "bfloat16_remainder", "Lars": "float16"}


def test_the_sample_has_every_rule_storage_and_scenario():
    rules, storages, scenarios = map(set, zip(*SAMPLE, strict=True))
    assert (rules, storages, scenarios) == (set(ops.RULES), set(ops.STORAGES), set(ptx.SCENARIOS))


@pytest.mark.parametrize(("rule", "storage", "scenario"), SAMPLE)
def test_device_code_does_what_the_core_does(library, programs, rule, storage, scenario):
    ptx.check(library, programs, rule, storage, scenario)


@pytest.mark.parametrize("state_type", ["bf16", "8bit"])
@pytest.mark.parametrize(
    ("rule", "storage"), [("Adan", "float32"), ("Lamb", "bfloat16_remainder"), ("Lars", "float16")]
)
def test_states_in_fewer_bits(library, programs, rule, storage, state_type):
    ptx.check(library, programs, rule, storage, "clip", state_type)


@pytest.mark.parametrize("rule", ["AdamW", "Lars", "Lamb"])  # one of each kind of norms
def test_no_interleaving_changes_a_bit(library, programs, rule):
    setups = [
        ptx.setup(rule, ptx.PtxCuda(library, programs, seed=seed, resident=resident), layers=True)
        for seed, resident in ((1, 6), (2, 2), (3, 99))
    ]
    for made in setups:
        ptx.noise(made)
        assert not made.backend.emulator.faults
    for made in setups[1:]:
        assert same_bits(setups[0].bits(), made.bits())
        assert same_bits(
            [setups[0].ledger.values, setups[0].ledger.ring, setups[0].layers],
            [made.ledger.values, made.ledger.ring, made.layers],
        )
