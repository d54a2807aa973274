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


def compiler(work):
    """The C++ compiler; skips where it has no sanitizers."""
    name = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if name is None:
        pytest.skip("no C++ compiler on PATH. Set CXX")
    (work / "empty.cpp").write_text("int main() {}\n")
    if subprocess.run([name, *FLAGS, work / "empty.cpp", "-o", work / "empty"], capture_output=True).returncode:
        pytest.skip(f"{name} can't build with {FLAGS[-2]}")
    return name


def run(work, widths, core):
    """Build the program from this text of the CPU core and run it."""
    name = compiler(work)
    common = [name, *FLAGS, f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'kernels'}", *(["-DPB_X86"] if len(widths) > 1 else [])]
    (work / "core.cpp").write_text(core)
    commands = [
        [f"-DPB_ISA={width}", *flags, "-c", work / "core.cpp", "-o", work / f"{width}.o"]
        for width, flags in widths.items()
    ]
    commands.append(["-c", ROOT / "tests" / "csrc" / "sanitize.cpp", "-o", work / "driver.o"])
    jobs = [subprocess.Popen([*common, *command]) for command in commands]
    assert [job.wait() for job in jobs] == [0] * len(jobs)
    subprocess.run([*common, *work.glob("*.o"), ROOT / "csrc" / "plan.cpp", "-o", work / "program"], check=True)
    return subprocess.run([work / "program"], capture_output=True, text=True, env=ENVIRONMENT)


def test_no_sanitizer_finds_anything(tmp_path):
    widths = {"portable": ()} | ({"avx2": ("-mavx2", "-mfma", "-mf16c")} if X86 else {})
    done = run(tmp_path, widths, (ROOT / "csrc" / "step_cpu.cpp").read_text())
    assert done.returncode == 0, done.stderr[:3000]
    lists = len(ops.RULES) * len(ops.STORAGES) * len(ops.DTYPES)
    assert int(done.stdout) in {lists * count for count in (1, len(widths))}  # a CPU may have no AVX2


def test_a_store_past_the_end_is_found(tmp_path):
    core = (ROOT / "csrc" / "step_cpu.cpp").read_text()
    loop = "for (int64_t i = 0; i < n; ++i) sum[i]"
    assert loop in core
    done = run(tmp_path, {"portable": ()}, core.replace(loop, loop.replace("<", "<=")))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
