"""Text from elsewhere made safe to print: what would drive a terminal is shown in its place, long words are cut."""

from __future__ import annotations

import re

LONGEST = 120  # characters of a word in a message

# C0 and C1 controls but for newline, what turns the direction of text, line separators, and halves of characters.
_UNSEEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_NO_LINE = re.compile("\n")
_WORD = re.compile(rf"\S{{{LONGEST + 1},}}")


def visible(text: str, lines: bool = False) -> str:
    r"""The text with every control character written out, ESC as \x1b; newlines are kept where `lines`, else spaces."""
    text = _UNSEEN.sub(_written, text)
    return text if lines else _NO_LINE.sub(" ", text)


def unwritten(problem: str, *files: object) -> str:
    """Why there is no result, and which of the files that were asked for are not written for it."""
    missing = ", ".join(str(file) for file in files if file is not None)
    return f"{problem}. Not written: {missing}" if missing else problem


def shortened(text: str) -> str:
    """The text with words of more than LONGEST characters cut in their middle."""
    return _WORD.sub(lambda match: _cut(match[0]), text)


def said(value: object) -> str:
    """A value as an error repeats it: its repr, visible, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits; lists within lists
        text = f"a {type(value).__name__} too large to write"
    text = visible(text)
    return text if len(text) <= LONGEST else _cut(text)


def given(value: object) -> str:
    """What stands in an object's place, as an error names it: a class by its name, else the value."""
    return f"the class {value.__name__}" if isinstance(value, type) else said(value)


def _cut(text: str) -> str:
    return f"{text[:60]}...{text[-20:]} ({len(text):,} characters)"


def _written(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
