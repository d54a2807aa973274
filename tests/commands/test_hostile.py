"""Inputs that no pybatch wrote, drawn: each command ends with a status of its own and a sentence, whatever it is given.

`bench/fuzz.py` draws more of the same.
"""

import random

import pytest
from cases import hostile
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

BRIEF = settings(max_examples=25, deadline=None, phases=(Phase.generate,), derandomize=True)
seeds = st.integers(0, 2**32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@pytest.mark.parametrize("kind", [hostile.records, hostile.trajectories, hostile.commands])
def test_no_input_is_taken_for_what_it_is_not(kind, folder):
    @BRIEF
    @given(seeds)
    def one(seed):
        assert kind(random.Random(seed), folder) is None, f"random.Random({seed})"

    one()


def test_sound_records_are_read_by_every_command(folder):
    for text in hostile.SOUND:
        (folder / "sound.json").write_text(text)
        for ending in hostile.ENDINGS:
            done = hostile.typed("report", str(folder / "sound.json"), "-o", str(folder / f"sound.{ending}"))
            assert hostile.complaint(done, (0,)) is None
