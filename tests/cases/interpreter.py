"""Triton's interpreter in a process of its own, since it must be chosen before Triton is imported."""

import json
import os
import subprocess
import sys

from cases.paths import TESTS

CODE = """
import json, sys, traceback
from cases import interpreter
interpreter.hasten()
found = {}
for name, program in json.load(sys.stdin).items():
    try:
        exec(program, {"__name__": "__main__"})
        found[name] = ""
    except BaseException:
        found[name] = traceback.format_exc()
print(json.dumps(found))
"""


def run(programs):
    """Run programs in one process, which imports torch and Triton once, each in names of its own.

    Args:
        programs: name -> source text.

    Returns:
        name -> the traceback of what failed, or "".
    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS)}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        input=json.dumps(programs),
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == programs.keys()
    return found


def hasten():
    """Change Triton's language once a launch, not again in each device function it calls: half of all its time.

    What a device function would change has been changed by the kernel that calls it, where both see the same modules.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # another version: it stays as it is
        return
    patch, changed = interpreter._patch_lang, set()

    def patch_once(fn):
        modules = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if modules <= changed:
            return None
        scope = patch(fn)
        changed.update(modules)
        restore = scope.restore

        def restored():
            restore()
            changed.clear()

        scope.restore = restored
        return scope

    interpreter._patch_lang = patch_once
