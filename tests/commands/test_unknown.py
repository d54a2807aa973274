"""A command that is not known."""

import pytest
from typer.testing import CliRunner

from pybatch import cli


@pytest.mark.parametrize(("typed", "meant"), [("benhc", "bench"), ("sweeep", "sweep"), ("compair", "compare")])
def test_the_nearest_command_is_named(typed, meant):
    done = CliRunner().invoke(cli.app, [typed])
    assert done.exit_code == 2
    assert f"No such command '{typed}'. Did you mean '{meant}'?" in done.output


def test_where_none_is_near_none_is_named():
    done = CliRunner().invoke(cli.app, ["xyzzy"])
    assert done.exit_code == 2
    assert "No such command 'xyzzy'" in done.output
    assert "Did you mean" not in done.output
