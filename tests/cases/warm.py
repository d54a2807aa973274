"""Python processes that have imported torch and pybatch before they begin: a server that runs nothing forks them.

The file that `executable` writes stands where a test's command has `sys.executable`: a process of a few milliseconds
that hands its streams, folder, environment and arguments to the server's fork, passes signals on, and ends as that
ends. KILL has the other killed, and what it started, before its own end: SIGKILL itself would end it first. What is
read while torch is imported (ATEN_CPU_CAPABILITY, ...) cannot be set so, and nothing is taken apart as such a process
ends: tests of either start Python itself. With CHILDREN in its environment a process starts others in the same way.
"""

import array
import atexit
import contextlib
import ctypes
import gc
import json
import os
import select
import shlex
import signal
import socket
import sys
import threading

CHILDREN = "TESTS_PYTHON_OF_CHILDREN"
SAFE = "TESTS_PYTHON_SAFE_PATH"  # -P was given
KILL = signal.SIGUSR1
PASSED_ON = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM, KILL: signal.SIGKILL}


def executable(path, server):
    """Write what stands for `sys.executable`; `server` is the path of its socket."""
    python = shlex.quote(sys.executable)
    asks = f"{python} -I -S {shlex.quote(__file__)} ask {shlex.quote(str(server))}"
    safe = f"-P) export {SAFE}=1; shift;;"
    path.write_text(f'#!/bin/sh\ncase "$1" in {safe} -u) shift;; esac\nexec {asks} "$@"\n')
    path.chmod(0o700)


def ask(path, arguments):
    """In the process that stands for the other: have it started, and end as it does."""
    for number in PASSED_ON:
        signal.signal(number, signal.default_int_handler)  # until there is somebody to pass it on to
    server = socket.socket(socket.AF_UNIX)
    server.connect(path)
    reads, writes = os.pipe()
    streams = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2, reads]))]
    server.sendmsg([b"?"], streams)
    os.close(reads)
    with open(writes, "w") as request:
        json.dump([arguments, os.getcwd(), dict(os.environ), os.getppid()], request)
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: server.sendall(bytes([PASSED_ON[number]])))
    for stream in (0, 1, 2):
        os.close(stream)  # its ends are the other's
    if not (answer := server.recv(4)):
        os._exit(70)  # the server was lost
    status = int.from_bytes(answer, "little", signed=True)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


def serve(path):
    """Fork for each that asks, until the parent has gone; returns in the forked process, with what it is to run."""
    parent = os.getppid()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(64)
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is the tests' affair
    running = {}  # connection: process
    print("serving", flush=True)
    while os.getppid() == parent:
        ready, _, _ = select.select([listening, woken, *running], [], [], 1.0)
        for connection in ready:
            if connection is listening:
                asking, _ = listening.accept()
                _, streams, _, _ = socket.recv_fds(asking, 1, 4)
                if not (child := os.fork()):
                    os.setpgid(0, 0)
                    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the server
                    signal.set_wakeup_fd(-1)
                    for own in (listening, asking, *running):
                        own.close()
                    os.close(woken)
                    os.close(wakes)
                    return received(*streams)
                for stream in streams:
                    os.close(stream)
                with contextlib.suppress(PermissionError, ProcessLookupError):
                    os.setpgid(child, child)  # here as well as there: whoever is first
                running[asking] = child
            elif connection == woken:
                os.read(woken, 4096)
            elif connection in running:
                said = connection.recv(1)
                number = said[0] if said else signal.SIGKILL
                with contextlib.suppress(ProcessLookupError):
                    (os.killpg if number == signal.SIGKILL else os.kill)(running[connection], number)
                if not said:
                    os.waitpid(running.pop(connection), 0)
                    connection.close()
        for connection, child in list(running.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                with contextlib.suppress(OSError):
                    connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "little", signed=True))
                connection.close()
                del running[connection]
    os._exit(0)


def received(*streams):
    """In the forked process: take the streams, the folder and the environment; the arguments."""
    *streams, asked = streams
    with open(asked) as request:
        arguments, folder, environment, parent = json.load(request)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    os.getppid = lambda: parent  # not the server
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    return arguments


def begin(arguments):
    """Run `-m MODULE ...`, `-c CODE ...` or `FILE ...` as Python would."""
    import runpy

    import numpy as np
    import torch

    np.random.seed()  # else that of every other fork
    threads = os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(int(threads) if threads else len(os.sched_getaffinity(0)))
    sys.executable = os.environ.get(CHILDREN, sys.executable)
    kind = arguments[0] if arguments[0] in ("-m", "-c") else None
    sys.argv = arguments[1:] if kind == "-m" else [arguments[0], *arguments[2:]] if kind else arguments
    search = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    first = {"-m": os.getcwd(), "-c": ""}.get(kind, os.path.dirname(os.path.abspath(arguments[0])))
    sys.path[:0] = search if os.environ.pop(SAFE, None) else [first, *search]
    if kind == "-m":
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(compile(arguments[1], "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        runpy.run_path(arguments[0], run_name="__main__")


def ended(arguments):
    """Begin, and end as Python does, except that nothing is taken apart: that takes a second of what was imported."""
    status, interrupted = 0, False
    try:
        begin(arguments)
    except SystemExit as end:
        status = end.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status, interrupted = 1, isinstance(error, KeyboardInterrupt)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it
            stream.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status & 0xFF)


def imported():
    """What takes long to import, once for all. The first optimizer imports much of torch; nothing runs in parallel."""
    import torch

    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    import pybatch.cli
    import pybatch.commands.bench
    import pybatch.commands.sweep
    import pybatch.jobs.bench
    import pybatch.jobs.sweep  # noqa: F401


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        ask(sys.argv[2], sys.argv[3:])
    sys.path.pop(0)  # this folder
    imported()
    gc.freeze()  # forks share what was imported as long as nobody writes to it
    ended(serve(sys.argv[2]))
