"""The documentation builds without a warning, has a page for every command, and names what is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cases.paths import ROOT

from pybatch import cli

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
WITHOUT_OPTIONS = {"doctor", "list"}


def test_it_builds_without_a_warning(tmp_path):
    command = [Path(sys.executable).parent / "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    plain = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # of the theme, on its own future
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=plain)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    page = (tmp_path / "site" / "commands" / "watch" / "index.html").read_text()
    assert "--optimizer-index" in page  # what the help says
    assert "&lt;!-- help" not in page
    assert not (tmp_path / "site" / "hooks.py").exists()


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_page_with_its_help(name):
    text = (DOCS / "commands" / f"{name}.md").read_text()
    assert text.startswith(f"# pybatch {name}\n")
    assert (f"<!-- help {name} -->" in text) == (name not in WITHOUT_OPTIONS)
    assert f"commands/{name}.md" in (ROOT / "mkdocs.yml").read_text()


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_files_that_a_page_names_are_there(path):
    text = path.read_text()
    for name in re.findall(r"^\$ (?:torchrun .*-m )?pybatch (\w+)", text, re.M):
        assert name in cli.COMMANDS
    named = re.findall(r"`((?:bench|examples|docs|tests|kernels|pybatch|csrc)/[\w./*-]+)", text)
    for name in named:
        assert any(ROOT.glob(name.rstrip("/"))), name
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / target).exists(), target


def test_every_example_is_listed():
    text = (DOCS / "examples.md").read_text()
    for example in (ROOT / "examples").iterdir():
        assert example.name.startswith("_") or f"`{example.name}`" in text
