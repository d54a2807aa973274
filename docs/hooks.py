"""Puts `pybatch COMMAND --help` in the place of `<!-- help COMMAND -->`: a page names no option that is not there."""

from __future__ import annotations

import re
from typing import Any

from pybatch import cli

WIDTH = 92  # columns of a code block that needs no scrolling


def on_page_markdown(markdown: str, **_: Any) -> str:
    """As mkdocs calls it, with the text of a page."""
    return re.sub(r"<!-- help ([a-z]+) -->", lambda found: help_of(found[1]), markdown)


def help_of(name: str) -> str:
    """The help of a command as a code block."""
    command = cli.Commands().get_command(None, name)
    context = command.context_class(command, info_name=f"pybatch {name}", max_content_width=WIDTH, terminal_width=WIDTH)
    return f"```text\n{command.get_help(context)}\n```"
