"""Inputs that no pybatch wrote, drawn: each command ends with a status of its own and a sentence, whatever it is given.

`bench/fuzz.py` draws more of the same.
"""

import random

import pytest
from cases import hostile, sweeps
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

BRIEF = settings(max_examples=25, deadline=None, phases=(Phase.generate,), derandomize=True)
seeds = st.integers(0, 2**32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@pytest.mark.parametrize("kind", [hostile.records, hostile.trajectories, hostile.logs, hostile.commands])
def test_no_input_is_taken_for_what_it_is_not(kind, folder):
    @BRIEF
    @given(seeds)
    def one(seed):
        assert kind(random.Random(seed), folder) is None, f"random.Random({seed})"

    one()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "runs.db"
    sweeps.measure(store=path, batches=[4, 8], rates=[0.1, 0.2], seeds=1)
    return path


@pytest.mark.parametrize("kind", [hostile.stores, hostile.resumed])
def test_no_store_is_taken_for_what_it_is_not(kind, base, folder):
    @BRIEF
    @given(seeds)
    def one(seed):
        assert kind(random.Random(seed), folder, base) is None, f"random.Random({seed})"

    one()


def test_sound_records_are_read_by_every_command(folder):
    for text in hostile.SOUND:
        (folder / "sound.json").write_text(text)
        for ending in hostile.ENDINGS:
            done = hostile.typed("report", str(folder / "sound.json"), "-o", str(folder / f"sound.{ending}"))
            assert hostile.complaint(done, (0,)) is None


@pytest.mark.parametrize(
    "words",
    [
        ("bench", "--html", "NAME"),
        ("bench", "-o", "NAME.json"),
        ("bench", "--workload", "NAME.py:Mine"),
        ("sweep", "--store", "NAME"),
        ("report", "NAME"),
        ("schedule", "NAME", "--steps", "10"),
        ("plan", "NAME"),
        ("fit", "NAME"),
        ("watch", "NAME"),
    ],
)
def test_a_name_that_no_file_can_have_is_refused(words):
    status, out, err = hostile.typed(*(word.replace("NAME", "9" * 5000) for word in words))
    assert (status, out) == (2, "")
    assert "oo long" in err
    assert len(err) < 400
