"""Errors that name what was meant."""

import pytest

from pybatch.base.errors import unknown


@pytest.mark.parametrize(
    ("value", "meant"),
    [("lightnin", "lightning"), ("Megatorn", "megatron"), ("hg", "hf"), ("hugging", None), ("trainer", None)],
)
def test_a_name_is_guessed_only_where_it_is_near(value: str, meant: str | None) -> None:
    """Half of the letters of another word are no likeness."""
    said = str(unknown("trainer", value, ["hf", "lightning", "megatron"]))
    assert said.endswith("Known: hf, lightning, megatron.")
    assert ("Did you mean" in said) == (meant is not None)
    assert unknown("trainer", list, ["hf"]).args == ("trainer <class 'list'> is no name. Known: hf.",)
    assert meant is None or f"Did you mean {meant!r}?" in said
