"""The study: measures what its declaration lists, record by record, and goes on where it was cut.

    python bench/study/run.py --quick                 # 15 minutes on two quiet cores of an AMD EPYC
    python bench/study/run.py --part digits           # one part; several: --part digits --part text
    python bench/study/run.py                         # all parts but the quick one, one after the other
    python bench/study/run.py --list [--part NAME]    # the commands, and which records are there
    python bench/study/run.py --quick --disturbed     # time again, on a quiet machine, what was timed on a busy one

Every record but the noise scale along a training is made by a command of pybatch that can be typed as well. Sweeps keep
their trainings in --stores, so that a part that is cut goes on; a record that is whole is not made again. Then
`python bench/study/page.py` writes docs/study.md from the records.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts beside this folder

from study.declaration import PARTS, Record

ROOT = Path(__file__).resolve().parents[2]
RECORDS = Path("bench/results/study")  # from the root, as the commands in the records have them
STORES = Path("bench/study/stores")
FROM = {"bench": ("advice",), "own": ("advice", "along-0", "along-1")}  # kinds made of another's record
TIMED = ("bench", "thorough", "times-0", "times-1", "times-2")  # kinds with step times


def command(record: Record, jobs: int, stores: Path = STORES) -> list[str]:
    """What is typed behind `pybatch` to make a record, in the root of the repository."""
    output = RECORDS / record.path
    if record.kind == "advice":
        bench, own = (str(output).replace("-advice.json", f"-{kind}.json") for kind in ("bench", "own"))
        return ["report", bench, own, "-o", str(output)]
    if record.kind in TIMED:
        return ["bench", *record.problem.flags, *record.flags, "-o", str(output)]
    store = stores / f"{store_of(record)}.db"
    kept = ["--store", str(store), "--resume", "--jobs", str(jobs)]
    return ["sweep", *record.problem.flags, *record.flags, *kept, "-o", str(output)]


def store_of(record: Record) -> str:
    """The name of a sweep's store. Sweeps of one problem share theirs, and with it the trainings that both need; those
    that judge stand apart, as seeds of one experiment in one store are pooled."""
    names = ["quick"] * (record.part == "quick") + [record.problem.name] + ["judge"] * (record.kind == "judge")
    return "-".join(names)


def whole(path: Path) -> bool:
    """Whether a record is there, and was not cut."""
    try:
        return bool(json.loads(path.read_text())["complete"])
    except (OSError, ValueError, KeyError):
        return False


def there(record: Record) -> bool:
    """Whether a record is whole, and of the command that is declared: one of an earlier declaration is made again."""
    path = ROOT / RECORDS / record.path
    if not whole(path):
        return False
    if record.kind == "advice" or record.kind.startswith("along"):
        return True
    made = json.loads(path.read_text()).get("environment") or {}
    return measured(shlex.split(made.get("command") or "")) == measured(["pybatch", *command(record, 2)])


def measured(words: Sequence[str]) -> list[str]:
    """A command without what changes no figure: how many processes trained, where its store was, whether it went on."""
    return re.sub(r" --(jobs \d+|store \S+|quiet|resume)\b", "", " ".join(words)).split()


def disturbed(path: Path) -> bool:
    """Whether a record has step times of a machine that was busy with something else."""
    capacity = json.loads(path.read_text()).get("capacity") if whole(path) else None
    return bool(capacity and capacity["disturbed"])


def compact(path: Path) -> None:
    """The same record on one line: a repository keeps it."""
    path.write_text(json.dumps(json.loads(path.read_text()), separators=(",", ":")) + "\n")


def make(record: Record, jobs: int, stores: Path) -> bool:
    """Measure one record; whether it is whole."""
    path = ROOT / RECORDS / record.path
    for kind in FROM.get(record.kind, ()):  # what is made of it is stale
        path.with_name(f"{record.problem.name}-{kind}.json").unlink(missing_ok=True)
    if record.kind.startswith("along"):
        from study.along import measure

        return measure(record, path)
    words = command(record, jobs, stores)
    if words[0] == "bench" and path.exists():
        words.append("--resume")
    words += ["--quiet"] * (words[0] != "report")
    asked = subprocess.Popen([sys.executable, "-m", "pybatch", *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        asked.wait()
    except KeyboardInterrupt:
        asked.terminate()  # pybatch writes what it has
        asked.wait()
        raise
    finally:
        if path.exists():
            compact(path)
    return whole(path)


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def run(records: Sequence[Record], jobs: int, stores: Path, again: bool = False) -> int:
    """Make what is missing of these; the exit status, 3 where something is missing still.

    Args:
        records, jobs, stores: what, and how.
        again: whether what was timed on a disturbed machine counts as missing.
    """
    missing = 0
    for record in records:
        path = ROOT / RECORDS / record.path
        if again and record.kind in TIMED and disturbed(path):
            path.unlink()
        if there(record):
            print(f"there     {record.path}", flush=True)
            continue
        if whole(path):
            path.unlink()
        (ROOT / RECORDS / record.path).parent.mkdir(parents=True, exist_ok=True)
        begin, busy, load = time.perf_counter(), sum(os.times()[:4]), os.getloadavg()[0]
        good = make(record, jobs, stores)
        missing += not good
        took, work = time.perf_counter() - begin, sum(os.times()[:4]) - busy  # processor time of children too
        print(
            f"{'made' if good else 'cut':9} {record.path}  {took:.0f} s, {work:.0f} CPU s, load {load:.1f}", flush=True
        )
    return 3 if missing else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the part of some 15 minutes alone")
    parser.add_argument("--part", action="append", choices=PARTS, help="any number; default: all but quick")
    parser.add_argument("--only", default="", help="records whose name holds this")
    parser.add_argument("--jobs", type=int, default=2, help="processes of a sweep")
    parser.add_argument("--stores", type=Path, default=STORES, help="folder of the sweeps' stores")
    parser.add_argument("--disturbed", action="store_true", help="time again what was timed on a busy machine")
    parser.add_argument("--list", action="store_true", help="say what would run, and stop")
    given = parser.parse_args()
    parts = given.part or (["quick"] if given.quick else [name for name in PARTS if name != "quick"])
    records = [record for part in parts for record in PARTS[part] if given.only in record.path]
    if not records:
        parser.error(f"--only {given.only!r}: no record of {', '.join(parts)} has that in its name. See --list.")
    if given.list:
        for record in records:
            if record.kind.startswith("along"):  # by `along.py`, no command of pybatch
                name = f"{record.problem.name}-{record.kind}"
                words = ["python", "bench/study/run.py", "--part", record.part, "--only", name]
            else:
                words = ["pybatch", *command(record, given.jobs, given.stores)]
            print(f"{'there  ' if there(record) else 'missing'} {shlex.join(words)}")
        return 0
    (ROOT / given.stores).mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, interrupted)
    try:
        return run(records, given.jobs, given.stores, given.disturbed)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
