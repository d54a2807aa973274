"""The build: PYBATCH_CUDA as documented, no libtorch, one OpenMP pool, a CPU-only machine is enough."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cases import ptx
from cases.paths import ROOT

from pybatch import _C

# pip puts cmake and ninja beside the Python of the environment, which need not be on PATH.
TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def configure(tmp_path, choice, path, source=ROOT):
    """Run CMake's configure step alone, with this PATH."""
    pybind11 = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = os.environ | {"PYBATCH_CUDA": choice, "PATH": path}
    environment.pop("CUDACXX", None)
    command = [
        shutil.which("cmake", path=path),
        "-G",
        "Ninja",
        "-S",
        str(source),
        "-B",
        str(tmp_path),
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    command += [f"-Dpybind11_DIR={pybind11}", "-DCMAKE_BUILD_TYPE=Release"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def without_nvcc(tmp_path):
    """A PATH with the tools of a build and no nvcc."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("cmake", "ninja", "c++", "g++", "gcc", "cc", "ld", "as", "ar", "ranlib", "sh", "uname"):
        if found := shutil.which(name, path=TOOLS):
            (tools / name).symlink_to(found)
    return str(tools)


def test_on_without_nvcc_fails_with_cause_and_remedy(tmp_path, without_nvcc):
    done = configure(tmp_path / "build", "on", without_nvcc)
    said = " ".join(done.stderr.split())
    if "nvcc was not found" not in said and Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("CMake finds a toolkit outside PATH")
    assert done.returncode != 0
    assert "PYBATCH_CUDA=on: nvcc was not found. Put the CUDA toolkit's bin directory on PATH" in said
    assert "PYBATCH_CUDA=auto" in said


def broken_nvcc(tools):
    """An nvcc that is there and can't compile, in a directory of its own on this PATH."""
    own = Path(tools).parent / "broken"
    own.mkdir()
    (own / "nvcc").write_text("#!/bin/sh\necho 'unsupported host compiler' >&2\nexit 1\n")
    (own / "nvcc").chmod(0o755)
    return f"{own}{os.pathsep}{tools}"


def test_an_nvcc_that_can_not_compile_is_not_called_missing(tmp_path, without_nvcc):
    path = broken_nvcc(without_nvcc)
    done = configure(tmp_path / "on", "on", path)
    said = " ".join(done.stderr.split())
    assert done.returncode != 0
    assert "broken/nvcc could not compile" in said
    assert "CUDAHOSTCXX" in said
    done = configure(tmp_path / "auto", "auto", path)
    assert done.returncode == 0, done.stderr
    assert "CPU part only, built where nvcc could not compile" in done.stdout


def test_a_search_for_nvcc_that_failed_is_made_anew(tmp_path, without_nvcc):
    path = broken_nvcc(without_nvcc)
    for _ in range(2):
        done = configure(tmp_path / "build", "auto", path)
        assert done.returncode == 0, done.stderr
        assert "Looking for a CUDA compiler" in done.stdout


def test_unknown_choice_is_refused(tmp_path, without_nvcc):
    done = configure(tmp_path / "build", "yes", without_nvcc)
    assert done.returncode != 0
    assert "PYBATCH_CUDA='yes': not a choice. Set it to auto, on or off." in " ".join(done.stderr.split())


def test_off_builds_the_cpu_part_and_says_why(tmp_path, without_nvcc):
    done = configure(tmp_path / "build", "off", without_nvcc)
    assert done.returncode == 0, done.stderr
    assert "CPU part only, built with PYBATCH_CUDA=off" in done.stdout


def kernels_with(tmp_path, name, change):
    """A copy of the kernels of which one file is changed, as old as it was."""
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    file = tmp_path / "kernels" / name
    was = file.stat()
    file.write_text(file.read_text() + change)
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    return tmp_path / "kernels"


def test_the_installed_core_was_compiled_from_these_kernels():
    if not _C.cuda:
        pytest.skip(f"no CUDA part: {_C.cuda_reason}")
    assert _C.kernel_sources == ptx.sources_of(ROOT / "kernels"), "pip install -e . compiles it anew"


@pytest.mark.parametrize("name", ["rule.h", "reduce.cuh", "step.cu"])
def test_a_core_of_other_kernels_is_not_taken_for_todays_by_their_age(tmp_path, monkeypatch, name):
    monkeypatch.setattr(ptx.ops, "build", lambda: ptx.ops.Build("portable", True, "90", None))
    monkeypatch.setattr(ptx.sass, "tool", lambda name: name)
    monkeypatch.setattr(ptx, "ptx_in", lambda binary, dumper: {"of": binary})
    monkeypatch.setattr(_C, "kernel_sources", ptx.sources_of(ROOT / "kernels"), raising=False)
    assert ptx.installed_kernels(kernels_with(tmp_path / "same", name, "")) == {"of": _C.__file__}
    assert ptx.installed_kernels(kernels_with(tmp_path / "other", name, "\n")) is None


def test_what_kernels_include_is_theirs():
    """Else what they were compiled from is not known by their own files."""
    files = [file for file in (ROOT / "kernels").iterdir() if file.suffix in ptx.SOURCES]
    named = {name for file in files for name in re.findall(r'#include "(.+)"', file.read_text())}
    assert named <= {file.name for file in files}


def test_changed_kernels_are_another_command_whatever_their_age(tmp_path):
    """CMake names their sources as the tests do, in the command of each file and in the module's."""
    if not ptx.nvcc():
        pytest.skip("nvcc was not found: put the CUDA toolkit's bin directory on PATH or set CUDACXX")
    for name, change in (("same", ""), ("other", "\n")):
        tree = tmp_path / name
        kernels = kernels_with(tree, "rule.h", change)
        shutil.copytree(ROOT / "csrc", tree / "csrc")
        shutil.copy(ROOT / "CMakeLists.txt", tree)
        done = configure(tree / "build", "on", TOOLS, tree)
        assert done.returncode == 0, done.stderr
        text = (tree / "build" / "build.ninja").read_text()
        objects = {file.name for file in kernels.glob("*.cu")} | {"module.cpp"}
        commands = re.findall(r"^build \S+?(\w+\.\w+)\.o: .*\n(?:  .*\n)*?  DEFINES = (.*)$", text, re.MULTILINE)
        told = {file: defines for file, defines in commands if "PB_KERNEL_SOURCES" in defines}
        assert set(told) == objects
        assert all(ptx.sources_of(kernels) in defines for defines in told.values())
    assert (tmp_path / "same/kernels/rule.h").stat().st_mtime == (tmp_path / "other/kernels/rule.h").stat().st_mtime


def linked():
    """Libraries the module asks for by name."""
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    text = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    return [line.split("[")[1].rstrip("]") for line in text.splitlines() if "(NEEDED)" in line]


def test_no_torch_and_no_cuda_library_is_linked():
    assert not [name for name in linked() if "torch" in name or "c10" in name or "cuda" in name]


def test_one_openmp_pool_serves_torch_and_the_module():
    """Where torch brings a libgomp under the plain name, the module must have taken that one."""
    import torch

    if not (Path(torch.__file__).parent / "lib" / "libgomp.so.1").exists():
        pytest.skip("this torch has an OpenMP runtime under a name of its own")
    program = (
        "from pybatch import ops; import re;"
        "print(len({l.split()[-1] for l in open('/proc/self/maps') if re.search(r'libgomp|libomp|libiomp', l)}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
