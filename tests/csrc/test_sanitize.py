"""The CPU core over the trap list under AddressSanitizer and UndefinedBehaviorSanitizer, in a program of its own."""

import os
import platform
import shutil
import subprocess

import pytest
from cases.paths import ROOT

from pybatch import ops

FLAGS = ("-std=c++20", "-g1", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
ENVIRONMENT = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}  # the core allocates nothing
X86 = platform.machine() in ("x86_64", "AMD64")


WIDTHS = {"portable": ()} | ({"avx2": ("-mavx2", "-mfma", "-mf16c")} if X86 else {})


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The CPU core with a driver; skips where the C++ compiler has no sanitizers."""
    name, work = (
        os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++"),
        tmp_path_factory.mktemp("sanitize"),
    )
    if name is None:
        pytest.skip("no C++ compiler on PATH. Set CXX")
    (work / "empty.cpp").write_text("int main() {}\n")
    if subprocess.run([name, *FLAGS, work / "empty.cpp", "-o", work / "empty"], capture_output=True).returncode:
        pytest.skip(f"{name} can't build with {FLAGS[-2]}")
    common = [name, *FLAGS, f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'kernels'}", *(["-DPB_X86"] if len(WIDTHS) > 1 else [])]
    commands = [
        [f"-DPB_ISA={width}", *flags, "-c", ROOT / "csrc" / "step_cpu.cpp", "-o", work / f"{width}.o"]
        for width, flags in WIDTHS.items()
    ]
    commands.append(["-c", ROOT / "tests" / "csrc" / "sanitize.cpp", "-o", work / "driver.o"])
    jobs = [subprocess.Popen([*common, *command]) for command in commands]
    assert [job.wait() for job in jobs] == [0] * len(jobs)
    subprocess.run([*common, *work.glob("*.o"), ROOT / "csrc" / "plan.cpp", "-o", work / "program"], check=True)
    return work / "program"


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)


def test_no_sanitizer_finds_anything(program):
    done = run(program)
    assert done.returncode == 0, done.stderr[:3000]
    lists = len(ops.RULES) * len(ops.STORAGES) * len(ops.DTYPES)
    assert int(done.stdout) in {lists * count for count in (1, len(WIDTHS))}  # a CPU may have no AVX2


def test_a_store_past_the_end_is_found(program):
    done = run(program, "short")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "WRITE of size 4" in done.stderr
    assert "step_cpu.cpp" in done.stderr  # where the core stores, not the driver
