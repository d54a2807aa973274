"""What adding an update rule touches: files of its own and one line in each list, nothing else."""

import re

import pytest
from cases.paths import ROOT

from pybatch import ops

SUFFIXES = {".h", ".cpp", ".cu", ".cuh", ".py", ".txt"}
SOURCES = [path for folder in ("kernels", "csrc", "pybatch") for path in (ROOT / folder).rglob("*")] + [
    ROOT / "CMakeLists.txt"
]
# Words used for nothing else.
NAMES = [("lion", "Lion", "Lion"), ("lars", "Lars", "LARS"), ("lamb", "Lamb", "LAMB"), ("nadam", "NAdam", "NAdam")]
# The two lists of rules, and the names that users import.
LISTS = {"kernels/rules.h", "kernels/rules.py", "pybatch/optim/__init__.py"}


def mentions(*words):
    """Lines of code with one of the words, by file; an include or import of the rule's own file is not counted."""
    pattern = re.compile(rf"\b({'|'.join(words)})\b")
    found = {}
    for path in SOURCES:
        if path.suffix in SUFFIXES:
            lines = [line for line in path.read_text().splitlines() if pattern.search(line)]
            if lines:
                found[str(path.relative_to(ROOT))] = [
                    line for line in lines if not re.match(r"\s*(#include|from|import)\b", line)
                ]
    return found


@pytest.mark.parametrize(("file", "rule", "public"), NAMES)
def test_a_rule_is_in_its_own_files_and_one_line_of_each_list(file, rule, public):
    found = mentions(file, rule)
    own = {f"kernels/{file}.h", f"kernels/{file}.py", f"pybatch/optim/{file}.py"}
    assert own <= found.keys()
    assert found.keys() - own == LISTS
    assert len(found["kernels/rules.h"]) == 1
    assert len(found["kernels/rules.py"]) == 1
    assert (ROOT / "tests" / "cases" / f"{file}.py").is_file()
    exports = (ROOT / "pybatch" / "optim" / "__init__.py").read_text()
    assert f'"{public}"' in exports


def test_a_mention_elsewhere_is_found():
    assert mentions("judge").keys() >= {"kernels/ledger.h", "kernels/phases.cuh"}


def test_both_lists_have_every_rule_under_one_number():
    """The number stands in tables and is never used again for another rule."""
    from pybatch.kernels import rules

    header = (ROOT / "kernels" / "rules.h").read_text()
    listed = {name: int(number) for number, name in re.findall(r"X\((\d+), (\w+)\)", header)}
    assert {name: rule.number for name, rule in ops.RULES.items()} == listed
    assert len(set(listed.values())) == len(listed)
    assert sorted(rules.RULES) == sorted(listed.values())
