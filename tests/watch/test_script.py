"""A script or module run as `python` runs it. No torch."""

import subprocess
import sys

import pytest

from pybatch.base.errors import UsageError
from pybatch.watch import script


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])


SHOW = """
import sys, os
import beside
print(__name__, __file__, sys.argv, sys.path[0], __package__, sys.modules["__main__"].__dict__ is globals(), beside.X)
"""


def written(folder, **files):
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/', 1) if name.startswith('pack__') else name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


def test_as_python_runs_a_script(tmp_path, monkeypatch, capsys):
    """Name, file, arguments, path and main module are those of `python script.py`."""
    written(tmp_path / "inner", show=SHOW, beside="X = 3")
    monkeypatch.chdir(tmp_path)
    ending = script.find("inner/show.py", ["--flag", "7"]).run()
    assert (ending.how, ending.status) == ("end", 0)
    plain = subprocess.run([sys.executable, "inner/show.py", "--flag", "7"], capture_output=True, text=True, check=True)
    assert capsys.readouterr().out == plain.stdout


def test_as_python_runs_a_module(tmp_path, monkeypatch, capsys):
    written(tmp_path, beside="X = 3")
    written(tmp_path / "package_of_test", __init__="", show=SHOW, __main__=SHOW)
    monkeypatch.chdir(tmp_path)
    for name in ("package_of_test.show", "package_of_test"):
        script.find(name, ["7"], module=True).run()
        plain = subprocess.run([sys.executable, "-m", name, "7"], capture_output=True, text=True, check=True)
        assert capsys.readouterr().out == plain.stdout


@pytest.mark.parametrize(
    ("code", "how", "status"),
    [
        ("", "end", 0),
        ("import sys; sys.exit()", "exit", 0),
        ("import sys; sys.exit(7)", "exit", 7),
        ("import sys; sys.exit('text')", "exit", 1),
        ("raise KeyboardInterrupt", "interrupt", 130),
        ("1 / 0", "error", 1),
    ],
)
def test_endings(tmp_path, capsys, code, how, status):
    written(tmp_path, ends=code)
    ending = script.find(str(tmp_path / "ends.py"), []).run()
    assert (ending.how, ending.status) == (how, status)
    script.tell(ending)
    said = capsys.readouterr().err
    assert said == ("text\n" if "text" in code else said)
    assert bool(said) == (how in ("error", "interrupt") or "text" in code)


def test_a_traceback_is_the_scripts_own(tmp_path, capsys):
    written(
        tmp_path,
        fails="def f():\n    try:\n        1 / 0\n    except ZeroDivisionError as e:\n"
        "        raise ValueError('b') from e\nf()",
    )
    path = str(tmp_path / "fails.py")
    script.tell(script.find(path, []).run())
    said = capsys.readouterr().err
    plain = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False)
    assert said == plain.stderr
    assert "pybatch" not in said


@pytest.mark.parametrize(
    ("target", "module", "message"),
    [
        ("nothing.py", False, "is not there.*Here are: broken.py"),
        ("broken.py", False, "line 1 is no Python"),
        (".", False, "a folder without __main__"),
        ("no.such.module", True, "cannot be found"),
        ("email", True, "a package without __main__"),
    ],
)
def test_what_is_no_script_is_refused(tmp_path, monkeypatch, target, module, message):
    written(tmp_path, broken="def (")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        script.find(target, [], module=module)
