"""The CUDA kernels' PTX on the emulator of tests/ptx: every rule in every storage and scenario, and planted faults.

python bench/ptx.py --every 10 --faults-every 40 --output bench/results/ptx.json

All of it takes hours of one core; these samples some ten minutes of two that others use too.

Needs nvcc and a C++ compiler, no GPU. A case runs on the C++ core and on the emulator, which must agree without a
fault. Then every instruction that the scenarios ran and that can be spoilt is: barriers and fences left out, accesses
shifted by their own size either way (`cases.planted_faults`). Such a fault is found by the emulator, or by a value that
is then wrong; what neither finds is listed, with its PTX line.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from cases import lists, planted_faults, ptx

from pybatch import ops

# Which case shows the faults of a kernel, and the program that holds it.
COVERING = {
    "accumulate": ("accumulate", "Lars", "bfloat16", "layers"),
    "norm": ("step", "Lars", "float32", "clip"),
    "prepare": ("step", "Lamb", "float32", "clip"),
    "update": ("step", "AdamW", "float32", "layers"),
}


WIDE = ("float32", "bfloat16_master", "bfloat16_remainder")  # where a code that moved on shows as such
RUNS = [*((scenario, "fp32") for scenario in ptx.SCENARIOS), ("clip", "bf16"), ("clip", "8bit")]


def run_cases(library, programs, every):
    """Every n-th case: figures, and which lines of each program no case ran."""
    began, instructions, launches, cases = time.perf_counter(), 0, 0, 0
    ran = {name: set() for name in programs}
    all_cases = [
        (rule, storage, *run)
        for rule in lists.RULES
        for storage in ops.STORAGES
        for run in RUNS
        if run[1] == "fp32" or storage in WIDE
    ]
    for case in all_cases[::every]:
        emulator = ptx.check(library, programs, *case)
        counts = emulator.counts
        cases, instructions, launches = cases + 1, instructions + counts[0], launches + counts[1]
        for i, name in enumerate(programs):
            ran[name] |= emulator.lines(i)
        print(f"{cases} cases, {instructions:,} instructions; {case}", file=sys.stderr)
    whole = {name: emulator.lines(i) | emulator.lines(i, ran=False) for i, name in enumerate(programs)}
    return {
        "cases": cases,
        "of": len(all_cases),
        "launches": launches,
        "instructions": instructions,
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "share_of_instructions_run": {name: round(len(ran[name]) / len(whole[name]), 4) for name in programs},
    }


def verdict(library, programs, case):
    """What shows that something is wrong: "fault", "value", or None."""
    try:
        ptx.check(library, programs, *case)
    except AssertionError as error:
        return "fault" if str(error).startswith("[") else "value"
    return None


def run_source_faults(library, programs, folder):
    """Faults planted into the CUDA source: the kinds of fault seen, by name."""
    seen = {}
    for i, (name, (file, old, new, kind)) in enumerate(planted_faults.SOURCE.items()):
        place = folder / f"patched-{i}"
        place.mkdir()
        patched = ptx.compile_kernels(place, [(file, old, new)], ["accumulate"])
        seen[name] = sorted(ptx.faults_of(library, programs | patched, *COVERING["accumulate"][1:]))
        assert kind in seen[name], name
    return seen


def run_faults(library, programs, every):
    """Every n-th planted fault of each kernel: how many were found by what, and those that were not."""
    report = {}
    for kernel, (program, *case) in COVERING.items():
        ran = ptx.check(library, programs, *case).lines(list(programs).index(program))
        found, missed = collections.Counter(), []
        faults = [of for of in planted_faults.planted(programs[program], f"{kernel}_kernel") if of[0] in ran]
        for line, what, text in faults[::every]:
            by = verdict(library, programs | {program: text}, case)
            found[by or "missed"] += 1
            if by is None:
                missed.append(f"line {line}, {what}: {programs[program].splitlines()[line - 1].strip()}")
        report[kernel] = {"case": case, **found, "not found": missed}
        print(kernel, dict(found), file=sys.stderr)
    return report


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--every", type=int, default=1, help="run only every n-th case")
    parser.add_argument("--faults-every", type=int, default=1, help="plant only every n-th fault")
    parser.add_argument("--only", choices=["cases", "faults"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        library = ptx.compile_emulator()
        programs = ptx.compile_kernels(Path(folder))
        report: dict[str, object] = {
            "architecture": ptx.ARCHITECTURE,
            "rules": len(ops.RULES),
            "storages": len(ops.STORAGES),
            "every_case": options.every,
            "every_fault": options.faults_every,
        }
        if options.only != "faults":
            report |= run_cases(library, programs, options.every)
        if options.only != "cases":
            began = time.perf_counter()
            report["planted_in_source"] = run_source_faults(library, programs, Path(folder))
            report["planted"] = run_faults(library, programs, options.faults_every)
            report["planted_minutes"] = round((time.perf_counter() - began) / 60, 1)
    text = json.dumps(report, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
