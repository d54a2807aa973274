"""What each test took: which are slow, and in what order files are run. Written by `pytest --update-seconds`."""

import json
from collections import defaultdict
from pathlib import Path

TABLE = Path(__file__).with_name("seconds.json")
SLOW = 0.4  # seconds of all cases of a test function together
OTHERS = 0.02  # a case of what is not in the table


def place(nodeid):
    """File and function of a test, without its class and its case."""
    file, _, rest = nodeid.partition("::")
    return file, rest.partition("[")[0].split("@")[0]


def read():
    """{file: {function: seconds}} of the functions that are slow."""
    return json.loads(TABLE.read_text())


class Recorder:
    """Adds up set-up, call and teardown by function, over all workers."""

    def __init__(self):
        self.seconds = defaultdict(lambda: defaultdict(float))

    def pytest_runtest_logreport(self, report):
        file, function = place(report.nodeid)
        self.seconds[file][function] += report.duration

    def pytest_sessionfinish(self, session):
        table = read() if TABLE.exists() else {}
        table.update(self.seconds)  # files that did not run keep what they had
        root = TABLE.parents[1]
        kept = {
            file: {name: round(taken, 1) for name, taken in sorted(functions.items()) if taken >= SLOW}
            for file, functions in sorted(table.items())
            if (root / file).exists()
        }
        TABLE.write_text(json.dumps({file: names for file, names in kept.items() if names}, indent=1) + "\n")
