"""Declared figures: what they name is there, and every one of them can be written, known or not."""

import dataclasses

import pytest

from pybatch import records
from pybatch.base.numerals import MISSING
from pybatch.records import Note
from pybatch.records.figure import figure, figures, interval_of, value_of, written
from pybatch.records.run import told

KINDS = [
    kind
    for name in records.__all__
    if isinstance(kind := getattr(records, name), type) and dataclasses.is_dataclass(kind) and figures(kind)
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_figure_names_is_a_field(kind):
    fields = {field.name for field in dataclasses.fields(kind)}
    for name, found in figures(kind).items():
        assert name in fields
        assert found.within is None or found.within in figures(kind)
        assert all(end.split(".")[0] in fields for end in found.interval or ())
        shown = [other for other in figures(kind).values() if other.shown and other.within is None]
        assert len({f"{other.label} {other.unit}" for other in shown}) == len(shown)


@pytest.mark.parametrize("kind", KINDS)
def test_a_figure_that_is_not_known_is_a_dash(kind):
    for name, found in figures(kind).items():
        if found.of is None and name not in ("regimes", "measured_regimes"):  # these are empty, not unknown
            assert found.form(None) == MISSING, name


@dataclasses.dataclass
class Part:
    low: float | None = 1.0
    high: float | None = None


@dataclasses.dataclass
class Whole:
    speed: float | None = dataclasses.field(
        default=2.0, metadata=figure("speed", "{examples}/s", interval=("part.low", "part.high"))
    )
    twice: float | None = dataclasses.field(default=1.0, metadata=figure("twice", of=lambda whole, _: 2 * whole.speed))
    part: Part | None = dataclasses.field(default_factory=Part)
    plain_one: float = 0.25


def test_a_figure_is_written_with_its_interval_and_its_unit():
    assert written(Whole(), "speed", "images") == "2 [≥ 1] images/s"
    assert written(Whole(part=Part(None, 3.0)), "speed", "images") == "2 [≤ 3] images/s"
    assert written(Whole(part=None), "speed", "images") == "2 images/s"
    assert written(Whole(speed=None), "speed") == f"{MISSING} [≥ 1]"
    assert written(Whole(speed=None, part=None), "speed") == ""
    assert interval_of(Whole(), "twice") == ""
    assert value_of(Whole(speed=3.0), "twice") == 6.0
    assert written(Whole(), "plain_one") == "0.25"


def test_a_name_that_an_interval_has_not_is_an_error():
    wrong = dataclasses.make_dataclass(
        "Wrong", [("x", float, dataclasses.field(default=1.0, metadata=figure("x", interval=("lo", "hi"))))]
    )
    with pytest.raises(AttributeError, match="lo"):
        written(wrong(), "x")


@pytest.mark.parametrize(
    ("path", "is_told"),
    [
        ("batches.step_ms", True),
        ("batches.step_ms_low", True),  # it stands in the column of the step time
        ("batches.bound_by", True),
        ("batches.sm_active", False),
        ("ceilings.datasheet_flops", False),
        ("capacity.drift", True),  # no figure is declared: told
        ("noise.low", True),
        ("verdict.best_batch", True),
        ("curves.points", True),
        ("run", True),
    ],
)
def test_notes_on_hidden_figures_are_left_to_the_record(path, is_told):
    assert told(Note(path, "why")) == is_told
