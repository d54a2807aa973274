"""Triton's interpreter in a process of its own, since it must be chosen before Triton is imported."""

import os
import subprocess
import sys

from cases.paths import TESTS

HEAD = "from cases import interpreter\ninterpreter.hasten()\n"


def run(*programs):
    """Run these programs one after the other; fails with what they printed."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS)}
    code = "\n".join((HEAD, *programs))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


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
