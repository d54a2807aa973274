"""Triton's interpreter in a process of its own, since it must be chosen before Triton is imported."""

import atexit
import json
import math
import os
import select
import subprocess
import sys
import tempfile
from functools import cache

from cases.paths import TESTS

CODE = """
import json, os, sys, traceback
from cases import interpreter
interpreter.hasten()
answers = os.fdopen(int(sys.argv[1]), "w")
for line in sys.stdin:
    found = {}
    for name, program in json.loads(line).items():
        try:
            exec(program, {"__name__": "__main__"})
            found[name] = ""
        except BaseException:
            found[name] = traceback.format_exc()
    print(json.dumps(found), file=answers, flush=True)
"""
LONGEST_S = 600.0  # of one file's programs


class Process:
    """It imports torch and Triton once for all files of a worker, and ends with its input."""

    def __init__(self):
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS)}
        reads, writes = os.pipe()
        self.answers, self.errors = os.fdopen(reads), tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore::RuntimeWarning", "-c", CODE, str(writes)],
            stdin=subprocess.PIPE,
            stdout=self.errors,
            stderr=self.errors,
            env=environment,
            text=True,
            pass_fds=[writes],
        )
        os.close(writes)
        atexit.register(self.end)

    def end(self):
        self.process.communicate()
        self.answers.close()
        self.errors.close()

    def run(self, programs):
        print(json.dumps(programs), file=self.process.stdin, flush=True)
        if not select.select([self.answers], [], [], LONGEST_S)[0]:
            self.process.kill()
        answer = self.answers.readline()
        if not answer:
            status = self.process.wait()
            self.errors.seek(0)
            said = self.errors.read().decode(errors="replace")[-4000:]
            raise AssertionError(f"the interpreter's process ended with {status}: {said}")
        return json.loads(answer)


_process = cache(Process)


def run(programs):
    """Run programs one after another in one process, each in names of its own.

    Args:
        programs: name -> source text.

    Returns:
        name -> the traceback of what failed, or "".
    """
    try:
        found = _process().run(programs)
    except (AssertionError, BrokenPipeError):
        _process.cache_clear()  # the next file has another
        raise
    assert found.keys() == programs.keys()
    return found


def hasten():
    """Have the interpreter ask once what it asks again at each operation: more than half of all its time.

    Triton's language is changed once a launch, not again in each device function it calls: what that would change has
    been changed by the kernel, where both see the same modules. NumPy's type of a dtype, and a tensor's shape as
    constants, are kept.
    """
    import triton
    from triton import language as tl
    from triton.runtime import interpreter

    if not triton.__version__.startswith("3.9."):  # what is changed is that version's
        return
    patch, changed, seen_by = interpreter._patch_lang, set(), {}

    def patch_once(fn):
        names = fn.__globals__  # of a module, which lives on
        if id(names) not in seen_by:
            seen_by[id(names)] = {id(value) for value in names.values() if value is tl or value is tl.core}
        modules = seen_by[id(names)]
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

    in_numpy, types, shapes = interpreter._get_np_dtype, {}, {}

    def np_dtype_once(dtype):
        name = dtype.scalar.name
        if name not in types:
            types[name] = in_numpy(dtype)
        return types[name]

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in shapes:
            shapes[shape] = tl.core.tuple([tl.constexpr(n) for n in shape]), tl.constexpr(math.prod(shape))
        self.shape, self.numel = shapes[shape]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, np_dtype_once
    tl.core.tensor.__init__ = tensor
