"""Text from elsewhere is shown, not sent."""

import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybatch.base.plain import LONGEST, said, shortened, visible


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters()))
def test_nothing_that_drives_a_terminal_is_left(text):
    shown = visible(text, lines=True)
    assert all(unicodedata.category(sign) not in ("Cc", "Cs") or sign == "\n" for sign in shown)
    assert "\n" not in visible(text)
    assert visible(shown, lines=True) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", r"\x1b[2J"),
        ("\x9b1m", r"\x9b1m"),
        ("a\tb\r", r"a\x09b\x0d"),
        ("\ud800", r"\ud800"),
        ("né ☃", "né ☃"),
    ],
)
def test_what_is_seen(text, shown):
    assert visible(text) == shown


def test_long_words_are_cut_and_say_how_long_they_were():
    assert shortened("a " + "9" * 5000 + " b") == "a " + "9" * 60 + "..." + "9" * 20 + " (5,000 characters) b"
    assert shortened("x" * LONGEST) == "x" * LONGEST
    assert len(said(10**4000)) < 200
    assert said(10**6000) == "a int too large to write"
    assert re.fullmatch(r"'\\x1b.*", said("\x1b"))
