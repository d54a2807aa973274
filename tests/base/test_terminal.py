"""Errors on a terminal: wrapped at its width, with commands, paths and options whole."""

import io
import os
import pty

import pytest

from pybatch.base import terminal
from pybatch.base.terminal import columns_of, wrapped

COMMAND = "'pybatch branch --checkpoints 100,1000,5000 -o run.json'"
LONG = (
    "pybatch: a schedule needs the noise scale, or branches, along a run, and this record hasn't any. Measure with "
    f"'pybatch watch train.py -o run.json', or {COMMAND}."
)


@pytest.mark.parametrize("columns", [20, 40, 80, 100])
def test_lines_fit_and_what_one_would_copy_is_whole(columns):
    found = wrapped(LONG, columns)
    assert COMMAND in found
    assert "'pybatch watch train.py -o run.json'" in found
    assert found.split() == LONG.split()
    pieces = [line for line in found.split("\n") if len(line) > columns]
    assert all(line.strip("., ") in LONG and "'" in line for line in pieces)  # a longer command has its line alone
    assert found.count("\n") >= len(LONG) // columns - 2


def test_paths_and_options_are_not_cut():
    path = "/data/a-long-name/with-hyphens/" + "x" * 90 + ".json"
    found = wrapped(f"pybatch: '{path}' has no --reference-batch in it, as far as can be told from here", 40)
    assert f"'{path}'" in found.split("\n")
    assert "--reference-batch" in found


def test_an_apostrophe_opens_no_quote():
    text = "pybatch: it can't be read and the others' records don't say why they can't " * 3
    assert max(map(len, wrapped(text.strip(), 40).split("\n"))) <= 40


def test_lines_of_the_text_stay_and_no_terminal_wraps_nothing():
    assert wrapped("a\n  b c\n\nd", 80) == "a\n  b c\n\nd"
    assert wrapped(LONG, None) == LONG


@pytest.mark.parametrize(
    ("said", "size", "columns"), [("", 100, 100), ("", 0, 80), ("60", 100, 60), ("no", 100, 100), ("3", 100, 20)]
)
def test_the_width_is_the_terminals_and_80_where_it_tells_none(monkeypatch, said, size, columns):
    import fcntl
    import struct
    import termios

    monkeypatch.setenv("COLUMNS", said)
    ours, theirs = pty.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, size, 0, 0))
        with open(theirs, "w", closefd=False) as stream:
            assert columns_of(stream) == columns
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_file_has_no_width(tmp_path):
    with (tmp_path / "err").open("w") as stream:
        assert columns_of(stream) is None


def test_an_error_is_told_wrapped_on_a_terminal_alone(monkeypatch):
    class Screen(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "40")
    counts = []
    for stream in (Screen(), io.StringIO()):
        monkeypatch.setattr(terminal.sys, "stderr", stream)
        terminal.tell(LONG.removeprefix("pybatch: "))
        assert stream.getvalue().split() == LONG.split()
        counts.append(stream.getvalue().count("\n"))
    assert counts[0] > 4
    assert counts[1] == 1
