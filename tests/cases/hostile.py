"""Hostile inputs, drawn: records, stores and command lines that no pybatch wrote, and what they may come to.

Each kind is a function of a random generator and a folder that gives a complaint, or None where all went as it must:
an exit status of its own, one sentence, no traceback, nothing sent to the terminal that drives it.
"""

import contextlib
import copy
import dataclasses
import io
import json
import re
import sqlite3
import sys
import zlib
from pathlib import Path
from unittest import mock

from cases import sweeps
from cases.points import curve, point
from cases.verdicts import BRANCHES, capacity, noise

from pybatch import cli
from pybatch.answer.verdict import advise
from pybatch.base.errors import PybatchError
from pybatch.noise.trajectory import SCHEMA
from pybatch.records import (
    Anchor,
    Ceilings,
    CommunicationFit,
    Convergence,
    Device,
    Distributed,
    DistributedPoint,
    Environment,
    NoisePoint,
    NoiseTrajectory,
    Note,
    Run,
    WorkloadInfo,
)

CREATED = "2026-01-02T03:04:05+00:00"
BAD_INPUT = 2
INCOMPLETE = 3
FAULT = 70
# C0 but for newline, tab-less tables, C1, and what turns the direction of text.
DRIVES = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

NUMBERS = (0, -1, 1, -0.0, 0.5, -3.7, 1e-300, 5e-324, 1e308, -1e308, 2**31, 2**53 + 1, 2**63, -(2**63), 10**400)
TEXTS = (
    "",
    " ",
    "\x1b[2J\x1b[H",
    "\x9b2J",
    "\x1b]0;title\x07",
    "a\rb\x08\x7f",
    "\ud800",
    "\u202egnirts",
    "</script><script>alert(1)</script>",
    "| a | b |\n# c",
    "`*_[x](javascript:y)",
    "{examples}",
    "{0.__class__}",
    "%s%n",
    "x" * 5000,
    "NaN",
    "\N{SNOWMAN}",
)


def record():
    """A run in which every section is filled."""
    measured = dataclasses.replace(
        capacity(),
        device=Device("cpu", 0, "Example CPU", 2**34, cores=2),
        ceilings=Ceilings(1e11, 2e10),
        workload=WorkloadInfo(
            "planted",
            "images",
            1000,
            "fp32",
            model="mlp",
            examples=5000,
            learning_rate=0.1,
            target={"train": 0.1},
            options={"dial": 3},
        ),
        anchor=Anchor(64, (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6), (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6)),
        notes=(Note("batches", "doubled"),),
    )
    steps = Convergence(
        (curve("tuned", [point(8, 900.0), point(64, 300.0), point(512, None, 0)]),),
        optimizer="sgd",
        seeds=3,
        trials=54,
        base_batch=8,
        branches=(BRANCHES["fitted"][0],),
        device=measured.device,
        workload=measured.workload,
    )
    points = tuple(DistributedPoint(k, 64, 20.8, 20.8 + 3 * (k - 1), 20.0, 32.0) for k in (2, 4))
    together = Distributed(4, "gloo", points, CommunicationFit(1.4, 2e9, 5e-5, 19_240, 0.03, 4))
    stretch = NoisePoint(0, 9, 40.0, 30.0, 50.0, 1.0, 40.0, "resolved", 10, 0.4)
    environment = Environment("3.11", "Linux", "0.1", "2.13", None, None, None, 2, 0, "pybatch bench")
    scale = noise(40)
    return Run(
        CREATED,
        environment,
        measured,
        scale,
        steps,
        advise(measured, scale, steps, together),
        distributed=together,
        trajectory=NoiseTrajectory((stretch,), "micro-batches"),
    )


def sound():
    """Records as pybatch writes them."""
    whole = record()
    alone = dataclasses.replace(whole, capacity=None, noise=None, verdict=None, distributed=None, trajectory=None)
    return [whole.to_json(), alone.to_json(), dataclasses.replace(whole, convergence=None).to_json()]


def places(tree, path=()):
    """Every path in a tree of JSON."""
    yield path
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        yield from places(value, (*path, key))


def value(rng, depth=0):
    """One that should not be there."""
    kinds = [
        lambda: rng.choice(NUMBERS),
        lambda: rng.choice(TEXTS),
        lambda: rng.choice([None, True, False]),
        lambda: [value(rng, depth + 1) for _ in range(rng.randrange(3))] if depth < 3 else [],
        lambda: {rng.choice(TEXTS): value(rng, depth + 1) for _ in range(rng.randrange(3))} if depth < 3 else {},
        lambda: float(rng.choice(["nan", "inf", "-inf"])),
        lambda: rng.choice([-1, 1]) * 10.0 ** rng.uniform(-20, 20),
    ]
    return rng.choice(kinds)()


def like(rng, found):
    """A value of the same type, which may be none that is possible."""
    if isinstance(found, bool):
        return not found
    if isinstance(found, int):
        return rng.choice([0, 1, 2, found + 1, found // 2, rng.randrange(2 ** rng.randrange(1, 62)), -found])
    if isinstance(found, float):
        return rng.choice([0.0, -found, found * 10.0 ** rng.uniform(-12, 12), 10.0 ** rng.uniform(-300, 300)])
    if isinstance(found, str):
        return rng.choice([*TEXTS, found[:1], found * 2])
    if found is None:
        return rng.choice([1, 0.5, "x"])
    return type(found)()


def mutated(rng, text):
    """A record with some places changed, as text."""
    tree = json.loads(text)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        paths = [path for path in places(tree) if path]
        if not paths:  # all was deleted
            break
        *above, last = rng.choice(paths)
        inner = tree
        for key in above:
            inner = inner[key]
        act = rng.randrange(6)
        if act == 0:
            del inner[last]
        elif act == 1 and isinstance(inner, list):
            inner.insert(last, copy.deepcopy(inner[last]))
        elif act == 2 and isinstance(inner[last], int | float) and abs(inner[last]) < 2**60:
            inner[last] = inner[last] * rng.choice([-1, 0, 1e-9, 1e9, 1e300])
        elif act == 3:
            other = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            inner[last], inner[other] = inner[other], inner[last]
        else:
            inner[last] = like(rng, inner[last]) if rng.random() < 0.7 else value(rng)
    return json.dumps(tree)


def broken(rng, text):
    """A record that is no record, as bytes."""
    whole = mutated(rng, text).encode()
    act = rng.randrange(12)
    if act == 0:
        return whole[: rng.randrange(len(whole))]
    if act == 1:
        place = rng.randrange(len(whole))
        return whole[:place] + bytes([rng.randrange(256)]) + whole[place + 1 :]
    if act == 2:
        return rng.choice(
            [b"[" * 200_000, b'{"a":' * 100_000, b"9" * 5000, b"\xff\xfe{}", b"", b"null", b"[]", b"1e999"]
        )
    if act == 3:
        digits = rng.choice([b"9" * 401, b"1e999", b"-1e999", b"9" * 5000, b"NaN", b"Infinity"])
        found = list(re.finditer(rb"-?\d+\.?\d*(e[-+]?\d+)?", whole))
        place = rng.choice(found)
        return whole[: place.start()] + digits + whole[place.end() :]
    return whole


def typed(*arguments):
    """The exit status, stdout and stderr of a command, as text."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", errors="surrogateescape", newline="") for _ in range(2)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", ["pybatch", *arguments]))
        stack.enter_context(mock.patch.object(cli, "_shorten_spinning"))
        stack.enter_context(contextlib.redirect_stdout(streams[0]))
        stack.enter_context(contextlib.redirect_stderr(streams[1]))
        try:
            cli.main()
        except SystemExit as end:
            status = end.code
        except BaseException as error:
            status = f"raised {type(error).__name__}: {error}"
        for stream in streams:
            stream.flush()
    return status, *(stream.buffer.getvalue().decode("utf-8", "surrogateescape") for stream in streams)


def complaint(done, allowed):
    """What is wrong with how a command went."""
    status, out, err = done
    if status not in allowed:
        return f"status {status}: {err[-500:]}"
    if "Traceback" in out + err:
        return f"a traceback: {err[-500:]}"
    if (found := DRIVES.search(out + err)) is not None:
        return f"{found[0]!r} was sent: {(out + err)[max(0, found.start() - 60) : found.end() + 20]!r}"
    if status == BAD_INPUT and len(err) > 2000:
        return f"a message of {len(err)} characters"
    return None


SOUND = sound()
ENDINGS = ("html", "md", "csv", "jsonl", "json", "txt")


def records(rng, folder):
    """A saved run that was changed, by `report` in some format or by `compare` with what it was."""
    base = rng.choice(SOUND)
    (folder / "old.json").write_text(base)
    (folder / "new.json").write_bytes(broken(rng, base))
    if rng.random() < 0.3:
        done = typed(
            "compare",
            str(folder / "old.json"),
            str(folder / "new.json"),
            "--format",
            rng.choice(["table", "md", "json"]),
        )
        return complaint(done, (0, BAD_INPUT))
    output = folder / f"page.{rng.choice(ENDINGS)}"
    files = [str(folder / "new.json")] + ([str(folder / "old.json")] if rng.random() < 0.2 else [])
    done = typed("report", *files, "-o", str(output))
    if (wrong := complaint(done, (0, BAD_INPUT))) is None and done[0] == 0:
        text = output.read_text(encoding="utf-8")
        if (found := DRIVES.search(text.replace("\t", ""))) is not None and output.suffix in (".md", ".txt"):
            return f"{found[0]!r} was written to {output.suffix}"
        if output.suffix == ".html" and "<script>alert(1)" in text:
            return "markup was not escaped"
    output.unlink(missing_ok=True)
    return wrong


def trajectories(rng, folder):
    """The noise trajectory of a training run that was changed, by `report`."""
    head = {"schema": SCHEMA, "source": "ddp", "unit": "tokens"}
    row = {"first_step": 0, "last_step": 9, "pairs": 10, "grad_sq": 10.0, "trace": 400.0, "loss": 5.0, "losses": 10}
    lines = [head, *(row | {"first_step": 10 * i, "last_step": 10 * i + 9} for i in range(12))]
    text = (
        "\n".join(mutated(rng, json.dumps(line)) if rng.random() < 0.1 else json.dumps(line) for line in lines) + "\n"
    )
    data = text.encode()
    if rng.random() < 0.2:
        data = data[: rng.randrange(len(data))]
    (folder / "noise.jsonl").write_bytes(data)
    return complaint(typed("report", str(folder / "noise.jsonl"), "-o", str(folder / "n.md")), (0, BAD_INPUT))


GARBAGE = (
    None,
    -1,
    0,
    2**62,
    1e308,
    float("nan"),
    "",
    "x",
    "{}",
    "[]",
    "[" * 3000,
    "null",
    b"",
    b"\xff\x00",
    "\x1b[2J",
    "\ud7ff",
)


def bomb(size=20_000_000):
    """Bytes that grow a thousandfold when they are unpacked."""
    return zlib.compress(bytes(size), 1)


def spoiled(rng, path):
    """Change a store in place."""
    act = rng.randrange(10)
    if act == 0:
        data = bytearray(path.read_bytes())
        for _ in range(rng.choice([1, 8, 64])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        return
    if act == 1:
        data = path.read_bytes()
        path.write_bytes(data[: rng.randrange(len(data))])
        return
    with contextlib.closing(sqlite3.connect(path)) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for _ in range(rng.choice([1, 1, 3])):
            table = rng.choice(tables)
            columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
            column = rng.choice(columns)
            [count] = db.execute(f"SELECT count(*) FROM {table}").fetchone()
            some = f"rowid IN (SELECT rowid FROM {table} LIMIT {rng.choice([1, 2, max(1, count)])})"
            with contextlib.suppress(sqlite3.Error):
                if act == 2:
                    db.execute(f"DELETE FROM {table} WHERE {some}")
                elif act == 3:
                    db.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
                elif act == 4:
                    db.execute(f"PRAGMA {rng.choice(['user_version', 'application_id'])} = {rng.randrange(2**31)}")
                elif act in (5, 6):
                    found = db.execute(f"SELECT rowid, {column} FROM {table} LIMIT 1").fetchone()
                    if found is not None and isinstance(found[1], str) and found[1][:1] == "{":
                        db.execute(
                            f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (mutated(rng, found[1]), found[0])
                        )
                elif act == 7 and table == "trial":
                    db.execute(f"UPDATE trial SET {rng.choice(['steps', 'train', 'test'])} = ?", (bomb(),))
                else:
                    db.execute(f"UPDATE {table} SET {column} = ? WHERE {some}", (rng.choice(GARBAGE),))
            db.commit()


def stores(rng, folder, base):
    """The store of a sweep that was spoiled, by `report`, which leaves it as it was."""
    path = folder / "spoiled.db"
    for other in folder.glob("spoiled.db*"):
        other.unlink()
    path.write_bytes(Path(base).read_bytes())
    spoiled(rng, path)
    before = path.read_bytes()
    done = typed("report", str(path), "-o", str(folder / f"s.{rng.choice(('md', 'csv', 'txt', 'jsonl'))}"))
    if (wrong := complaint(done, (0, BAD_INPUT))) is not None:
        return wrong
    return None if path.read_bytes() == before else "the store was changed by reading it"


def resumed(rng, folder, base):
    """The store of a sweep that was spoiled, by a sweep that resumes it: refused, or whole, and no trial lost."""
    path = folder / "resumed.db"
    for other in folder.glob("resumed.db*"):
        other.unlink()
    path.write_bytes(Path(base).read_bytes())
    spoiled(rng, path)
    spoiled_bytes, rows = path.read_bytes(), _trials(path)
    try:
        found = sweeps.measure(store=path, resume=True, batches=[4, 8], rates=[0.1, 0.2], seeds=1)
    except PybatchError as error:
        if len(str(error)) > 2000:
            return f"a message of {len(str(error))} characters"
        if rows is None and path.read_bytes() != spoiled_bytes:
            return "a file that can't be read was changed"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    else:
        if not (found.complete or found.notes):
            return "it is not complete, and nothing says why"
        if found.complete and [p.batch for p in found.curves[0].points] != [4, 8]:
            return "complete, and a batch size is missing"
    after = _trials(path)
    if rows is not None and (after is None or not rows <= after):
        return f"of {len(rows)} trials {len(rows - (after or set()))} were lost"
    return None


def _trials(path):
    """Keys of the trials of a store; None where they can't be read."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            return {key for (key,) in db.execute("SELECT key FROM trial")}
    except (sqlite3.Error, UnicodeDecodeError):
        return None


_CELLS = (
    "",
    "inf",
    "-inf",
    "nan",
    "diverged",
    "1e999",
    "-3",
    "0",
    "0.5",
    "1_000",
    "٣",
    "1,5",
    "x" * 300,
    "9" * 5000,
    "=1",
)
_LINES = ("", ",,,,", "#", "8", "batch,steps", "8,1,2,3,4,5,6,7,8,9", '"8,1', "\x1b[2J", "8;100;1")


def logs(rng, folder):
    """A user's own logs that were changed, by `fit`."""
    names, mark = ["batch", "seed", "steps"], rng.choice(",,,;\t")
    for extra in ("rate", "cap", "before", "status", "note"):
        if rng.random() < 0.25:
            names.append(extra)
    if rng.random() < 0.2:
        names[rng.randrange(len(names))] = rng.choice(("Batch Size", "steps", "", "\ufeffbatch", "x" * 200, "epoch"))
    rows = []
    for batch in rng.sample((4, 8, 16, 32, 64, 128, 256), rng.randrange(1, 8)):
        for seed in range(rng.choice((1, 2, 3))):
            steps = round(100 * (1 + 60 / batch) * rng.uniform(0.9, 1.1))
            own = {"batch": batch, "seed": seed, "steps": steps, "rate": 0.1, "cap": 9999, "before": steps - 5}
            rows.append([str(own.get(name, "")) for name in names])
    for _ in range(rng.choice((0, 1, 1, 4))):
        row = rng.choice(rows)
        row[rng.randrange(len(row))] = rng.choice(_CELLS)
    lines = [mark.join(names), *(mark.join(row) for row in rows)]
    for _ in range(rng.choice((0, 0, 1, 2))):
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(_LINES))
    data = rng.choice(("\n", "\r\n")).join(lines).encode()
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data))]
    if rng.random() < 0.1:
        data = bytearray(data or b"x")
        data[rng.randrange(len(data))] = rng.randrange(256)
    (folder / "logs.csv").write_bytes(data)
    done = typed("fit", str(folder / "logs.csv"), "--format", rng.choice(("table", "md", "json", "csv")))
    if done[0] == INCOMPLETE and not done[1].strip():
        return "incomplete, and nothing was said"
    return complaint(done, (0, BAD_INPUT, INCOMPLETE))


_SHARED = "workload batch dtype seed format output"
_NAMES = {
    "bench": f"{_SHARED} model data option size gpu time-budget compare fail-on html thorough quick resume cuda-graph",
    "sweep": f"{_SHARED} model option rule seeds target optimizer rates search base-batch base-rate max-steps "
    "gap-epochs store resume jobs ray noise-budget",
    "branch": f"{_SHARED} factors checkpoints optimizer lr rule seeds tolerance time-budget keep",
    "report": "output target png",
    "compare": "fail-on format",
}
FLAGS = {command: [f"--{name}" for name in names.split()] for command, names in _NAMES.items()}
SWITCHES = {"--thorough", "--quick", "--resume", "--cuda-graph"}
ARGUMENTS = (
    "0",
    "-1",
    "1",
    "7",
    "9" * 30,
    "9" * 5000,
    "1e308",
    "1e999",
    "-1e999",
    "nan",
    "inf",
    "0x10",
    "1_000",
    "\u0661\u0662",
    "8,16",
    "8-64*2",
    "64-8*2",
    "1-9223372036854775807*2",
    "1-1000000000+1",
    "8-64*1",
    "8-64*0",
    "8,8,8",
    "1e3",
    ",",
    "-",
    "train=0.1",
    "train=-1",
    "train=0",
    "train=1e999",
    "train=nan",
    "test=0.1,train=0.2",
    "bogus=1",
    "train=" + "9" * 400,
    "throughput:-3%",
    "throughput:-300%",
    "throughput:-" + "9" * 400 + "%",
    "throughput:+1e999%",
    "memory:-100%",
    "tuned",
    "sqrt,linear",
    "sgd",
    "sgd:momentum=9e999",
    "sgd:momentum=nan",
    "adamw:betas=(0.9,2)",
    "sgd:lr=1",
    "sgd:momentum=" + "9" * 5000,
    "sgd:momentum=" + "(" * 300,
    "adam:eps=-1",
    "sgd:nesterov=3",
    "digits",
    "quadratic",
    "text",
    "mlp",
    "cnn",
    "fp32",
    "bf16",
    "tiny",
    "base",
    "table",
    "json",
    "csv",
    "run.json",
    "run.html",
    "run.xls",
    "/",
    "no/such/x.json",
    "\x1b[2J",
    "caf\udce9.json",
    "caf\udce9.html",
    "",
    " ",
    "x" * 5000,
    "file.py:Class",
    "a:b:c",
    ":",
)


def commands(rng, folder):
    """A command line of flags and arguments that need not go together; nothing is measured."""
    command = rng.choice(list(FLAGS))
    arguments = [command]
    if command in ("report", "compare"):
        (folder / "run.json").write_text(SOUND[0])
        arguments += [str(folder / "run.json")] * (2 if command == "compare" else 1)
    else:
        arguments += ["--cpu", "-q"]
    for flag in rng.sample(FLAGS[command], rng.randrange(1, min(4, len(FLAGS[command])))):
        arguments += [flag] if flag in SWITCHES else [flag, rng.choice(ARGUMENTS)]
    ready = record()
    with contextlib.chdir(folder), contextlib.ExitStack() as stack:
        for job in ("bench.run_bench", "sweep.run_sweep", "branch.run_branches"):
            stack.enter_context(mock.patch(f"pybatch.jobs.{job}", return_value=ready))
        stack.enter_context(mock.patch("pybatch.report.formats.png.write_pngs", return_value=[]))
        done = typed(*arguments)
    wrong = complaint(done, (0, BAD_INPUT, 1) if "--fail-on" in arguments else (0, BAD_INPUT))
    return None if wrong is None else f"{arguments}: {wrong}"
