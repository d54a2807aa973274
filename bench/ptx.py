"""The CUDA kernels' PTX on the emulator of tests/ptx: every rule in every storage and scenario, and planted faults.

python bench/ptx.py --store /tmp/ptx.json --faults-every 4 --output bench/results/ptx.json

Needs nvcc and a C++ compiler, no GPU. A case runs on the C++ core and on the emulator, which must agree without a
fault. Then instructions that the scenarios ran are spoilt: barriers and fences left out, accesses shifted by their own
size either way (`cases.planted_faults`). Such a fault is found by the emulator, or by a value that is then wrong, in
one of the kernel's cases. Of one that none finds, the memory is compared with that of the kernel as it is: "nothing"
where no bit of it differs in any case, "missed" where one does; both are listed with their PTX line.

A case takes half a second of one core, a fault two. With --store what was done is kept, and the next run goes on.
"""

from __future__ import annotations

import argparse
import collections
import gc
import hashlib
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from cases import lists, planted_faults, ptx
from cases.problem import same_bits

from pybatch import ops

# Which cases show the faults of a kernel, and the program that holds it.
COVERING = {
    "accumulate": ("accumulate", [("Lars", "bfloat16", "layers")]),
    "norm": ("step", [("Lars", "float32", "clip"), ("Lars", "bfloat16", "scaler"), ("Lars", "float32", "layers")]),
    "prepare": ("step", [("Lamb", "float32", "clip"), ("Lamb", "float32", "skip"), ("Lamb", "bfloat16", "layers")]),
    "update": ("step", [("AdamW", "float32", "layers"), ("AdamW", "bfloat16", "scaler"), ("AdamW", "float32", "clip")]),
}
SOURCE_FAULTS_ON = ("Lars", "bfloat16", "layers")

WIDE = ("float32", "bfloat16_master", "bfloat16_remainder")  # where a code that moved on shows as such
RUNS = [*((scenario, "fp32") for scenario in ptx.SCENARIOS), ("clip", "bf16"), ("clip", "8bit")]
ADDRESSES = ("rows", "_host")  # which are others in every run
TESTS = Path(__file__).parents[1] / "tests"
JUDGES = [
    Path(__file__),
    *(TESTS / "cases" / f"{name}.py" for name in ("ptx", "lists", "agreement", "planted_faults", "problem")),
]
JUDGES += sorted((TESTS / "ptx" / "emulator").iterdir())
SAVE_S = 20.0  # between two writings of the store: what is lost at most where a run is cut short


class Store:
    """What was done to these programs, in a JSON file, or nowhere; of other programs, cases or another emulator nothing
    is known."""

    def __init__(self, path, programs):
        self.path, self._saved = path, time.perf_counter()
        judged = "".join(path.read_text() for path in JUDGES)
        of = hashlib.sha256("".join([*programs.values(), judged]).encode()).hexdigest()
        self.found = {"of": of, "cases": {}, "ran": {}, "source": {}, "faults": {}, "seconds": 0.0}
        if path and path.exists() and (kept := json.loads(path.read_text()))["of"] == of:
            self.found = kept

    def piece(self, kind, name, work):
        """A piece as it is stored; done where it is not."""
        of = self.found[kind]
        if name not in of:
            began = time.process_time()
            of[name] = work()
            self.found["seconds"] += time.process_time() - began
            gc.collect()  # a list and its backend know each other
            if time.perf_counter() - self._saved > SAVE_S:
                self.save()
        return of[name]

    def save(self):
        self._saved = time.perf_counter()
        if self.path:
            whole = self.path.with_suffix(".writing")
            whole.write_text(json.dumps(self.found))
            whole.replace(self.path)


def run_cases(library, programs, every, store):
    """Every n-th case: figures, and which lines of each program no case ran."""
    all_cases = [
        (rule, storage, *run)
        for rule in lists.RULES
        for storage in ops.STORAGES
        for run in RUNS
        if run[1] == "fp32" or storage in WIDE
    ]
    ran = store.found["ran"]

    def run(case):
        emulator = ptx.check(library, programs, *case)
        for i, name in enumerate(programs):
            ran[name] = sorted({*ran.get(name, ()), *emulator.lines(i)})
            ran[f"{name}, all"] = len(emulator.lines(i)) + len(emulator.lines(i, ran=False))
        return emulator.counts

    for case in all_cases[::every]:
        store.piece("cases", " ".join(case), partial(run, case))
        print(f"{len(store.found['cases'])} cases; {case}", file=sys.stderr)
    store.save()
    done = store.found["cases"].values()
    return {
        "cases": len(done),
        "of": len(all_cases),
        "launches": sum(launches for _, launches in done),
        "instructions": sum(instructions for instructions, _ in done),
        "share_of_instructions_run": {name: round(len(ran[name]) / ran[f"{name}, all"], 4) for name in programs},
    }


def run_source_faults(library, programs, folder, store):
    """Faults planted into the CUDA source: the kinds of fault seen, by name."""

    def run(i, name):
        file, old, new, kind = planted_faults.SOURCE[name]
        place = folder / f"patched-{i}"
        place.mkdir()
        patched = ptx.compile_kernels(place, [(file, old, new)], ["accumulate"])
        seen = sorted(ptx.faults_of(library, programs | patched, *SOURCE_FAULTS_ON))
        assert kind in seen, name
        return seen

    return {name: store.piece("source", name, partial(run, i, name)) for i, name in enumerate(planted_faults.SOURCE)}


def memory_after(library, programs, case):
    """All that a case leaves on the emulated device, whatever it computes."""
    rule, storage, scenario = case
    made = ptx.setup(rule, ptx.PtxCuda(library, programs), storage, layers=scenario == "layers")
    ptx.SCENARIOS[scenario](made)
    left = ptx.memory_of(made.list, made)
    return [left[name].clone().reshape(-1).view(torch.uint8) for name in sorted(left) if name not in ADDRESSES]


def verdict(library, programs, spoilt, cases):
    """What shows that something is wrong: "fault", "value"; else "missed", or "nothing" where nothing is wrong."""
    for case in cases:
        try:
            ptx.check(library, spoilt, *case)
        except AssertionError as error:
            return "fault" if str(error).startswith("[") else "value"
    same = all(same_bits(memory_after(library, programs, case), memory_after(library, spoilt, case)) for case in cases)
    return "nothing" if same else "missed"


def run_faults(library, programs, every, first, store):
    """Every n-th planted fault of each kernel from the first on: how many were found by what, and which were not."""
    report = {}
    for kernel, (program, cases) in COVERING.items():
        place = list(programs).index(program)
        ran = [ptx.check(library, programs, *case).lines(place) for case in cases]
        found, unfound = collections.Counter(), []
        faults = [
            of for of in planted_faults.planted(programs[program], f"{kernel}_kernel") if of[0] in set().union(*ran)
        ]
        for line, what, text in faults[first::every]:
            own = [case for case, of in zip(cases, ran, strict=True) if line in of]
            name = f"{kernel}, line {line}, {what}"
            by = store.piece("faults", name, partial(verdict, library, programs, programs | {program: text}, own))
            found[by] += 1
            if by in ("missed", "nothing"):
                unfound.append(f"{by}: line {line}, {what}: {programs[program].splitlines()[line - 1].strip()}")
            print(name, by, dict(found), file=sys.stderr)
        store.save()
        report[kernel] = {"cases": cases, "planted": sum(found.values()), "of": len(faults), **found, "list": unfound}
    return report


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--store", type=Path, help="what was done is kept here, for a run that goes on")
    parser.add_argument("--every", type=int, default=1, help="run only every n-th case")
    parser.add_argument("--faults-every", type=int, default=1, help="plant only every n-th fault")
    parser.add_argument("--faults-from", type=int, default=0, help="of each kernel leave out so many at the beginning")
    parser.add_argument("--only", choices=["cases", "faults"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        library = ptx.compile_emulator()
        programs = ptx.compile_kernels(Path(folder))
        store = Store(options.store, programs)
        report: dict[str, object] = {
            "architecture": ptx.ARCHITECTURE,
            "rules": len(ops.RULES),
            "storages": len(ops.STORAGES),
            "every_case": options.every,
            "every_fault": options.faults_every,
            "first_fault": options.faults_from,
        }
        if options.only != "faults":
            report |= run_cases(library, programs, options.every, store)
        if options.only != "cases":
            report["planted_in_source"] = run_source_faults(library, programs, Path(folder), store)
            report["planted"] = run_faults(library, programs, options.faults_every, options.faults_from, store)
        report["processor_minutes"] = round(store.found["seconds"] / 60, 1)
    text = json.dumps(report, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
