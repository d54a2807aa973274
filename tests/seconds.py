"""What each test took: which are slow, and in what order files are run. Written by `pytest --update-seconds`."""

import json
import time
from collections import defaultdict
from pathlib import Path

import pytest

TABLE = Path(__file__).with_name("seconds.json")
SLOW = 0.5  # seconds of all cases of a test function together, or of a fixture that several tests share
OTHERS = 0.02  # a case of what is not in the table
SHARED = pytest.StashKey()  # fixtures set up for the test that is being set up: [file or folder, name, seconds]


def place(nodeid):
    """File and function of a test, without its class and its case."""
    file, _, rest = nodeid.partition("::")
    return file, rest.partition("[")[0].split("@")[0]


def read():
    """{file or folder: {function or fixture: seconds}} of those that are slow."""
    return json.loads(TABLE.read_text())


def of(item, table):
    """{(file, name): seconds} of a test's function and of the fixtures it shares with others; empty of a fast test."""
    asked = [(found[-1].baseid, name) for name, found in item._fixtureinfo.name2fixturedefs.items()]
    return {key: table[key[0]][key[1]] for key in (place(item.nodeid), *asked) if key[1] in table.get(key[0], {})}


class Recorder:
    """Adds up by function and by shared fixture, over all workers."""

    def __init__(self):
        self.seconds = defaultdict(lambda: defaultdict(float))

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        begin = time.perf_counter()
        try:
            return (yield)
        finally:
            taken = time.perf_counter() - begin
            if fixturedef.scope != "function" and taken >= SLOW:
                request.session.stash.setdefault(SHARED, []).append([fixturedef.baseid, fixturedef.argname, taken])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item):
        try:
            return (yield)
        finally:
            shared = item.session.stash.get(SHARED, [])
            item.user_properties += [("shared", found) for found in shared]
            item.session.stash[SHARED] = []

    def pytest_runtest_logreport(self, report):
        file, function = place(report.nodeid)
        shared = [found for name, found in report.user_properties if name == "shared"] if report.when == "setup" else []
        for base, name, taken in shared:
            self.seconds[base][name] = max(taken, self.seconds[base][name])
        self.seconds[file][function] += report.duration - sum(taken for *_, taken in shared)

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workerinput"):
            return
        table = read() if TABLE.exists() else {}
        for file, functions in self.seconds.items():  # what did not run keeps what it had
            table[file] = table.get(file, {}) | functions
        root = TABLE.parents[1]
        kept = {
            file: {name: round(taken, 1) for name, taken in sorted(functions.items()) if taken >= SLOW}
            for file, functions in sorted(table.items())
            if (root / file).exists()
        }
        TABLE.write_text(json.dumps({file: names for file, names in kept.items() if names}, indent=1) + "\n")
