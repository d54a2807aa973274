"""What a noise scale says of itself where it is printed."""

import pytest

from pybatch.records import NoiseScale


@pytest.mark.parametrize(
    ("noise", "text"),
    [
        (
            NoiseScale(113.2, 82, 165, 1, 1, "resolved", "micro-batches", 47, first_step=143, last_step=189),
            "B_simple 113 [82 to 165] examples (resolved, by micro-batches, steps 143 to 189)",
        ),
        (
            NoiseScale(40, 31, None, 1, 1, "lower_bound", "ddp", 9, unit="tokens"),
            "B_simple 40 [≥ 31] tokens (lower bound, by ddp)",
        ),
        (
            NoiseScale(None, None, None, None, None, "unresolved", "ddp", 0),
            "B_simple not known, in examples (unresolved, by ddp)",
        ),
    ],
)
def test_the_figure_with_its_interval(noise, text):
    assert str(noise) == text
