"""What a newcomer meets before anything is measured: sources that hide the installation, and the first help."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from cases.paths import ROOT

from pybatch import cli

HIDDEN = """
import sys
try:
    from pybatch.optim import AdamW
except ImportError as error:
    print(error)
sys.argv = ["pybatch", "list"]
from pybatch import cli
cli.main()
"""


@pytest.mark.parametrize("installed", [True, False])
def test_sources_without_the_compiled_core_say_so_with_the_remedy(tmp_path, installed):
    """As in a clone after `pip install .`: its folder comes first on the path, and the wheel's core is not in it."""
    shutil.copytree(ROOT / "pybatch", tmp_path / "pybatch", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    packages = Path(sysconfig.get_path("purelib"))
    if not installed:  # what pybatch needs, but not pybatch
        needed = [path for path in packages.iterdir() if not path.name.startswith("pybatch")]
        packages = tmp_path / "packages"
        packages.mkdir()
        for path in needed:
            (packages / path.name).symlink_to(path)
    command = [sys.executable, "-S", "-c", HIDDEN]  # without site no .pth file is read: an editable one would win
    environment = os.environ | {"PYTHONPATH": str(packages)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    [said] = done.stdout.splitlines()
    assert f"the sources in {tmp_path / 'pybatch'}" in said
    assert (f"hides the one installed in {packages}" in said) == installed
    assert said.endswith(f"'pip install -e {tmp_path}', or start Python from another folder.")
    assert (done.returncode, done.stderr) == (2, f"pybatch: {said}\n")


HEAVY = ("torch", "scipy", "numpy", "sklearn", "plotly", "rich", "sqlite3")
ASKED = """
import json, sys
from pybatch.__main__ import main
sys.argv = ["pybatch", *sys.argv[1:]]
try:
    main()
finally:
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
"""


@pytest.mark.parametrize("asked", ["--help", "--version"])
def test_the_first_help_imports_nothing_heavy(tmp_path, asked):
    done = subprocess.run(
        [sys.executable, "-c", ASKED, asked], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "pybatch" in done.stdout
    imported = json.loads(done.stderr)
    assert "typer" in imported
    assert not set(HEAVY) & set(imported)


def test_the_list_of_commands_has_each_ones_own_words():
    for name, (_, summary) in cli.COMMANDS.items():
        command = cli.Commands().get_command(None, name)
        assert command.name == name
        assert " ".join(command.help.split("\n\n")[0].split()) == summary
    assert cli.Commands().get_command(None, "benhc") is None
