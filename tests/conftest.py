"""Shared by the tests: how they are spread over the cores, and a synthetic record in which every section is filled."""

import os
import signal
import subprocess
import sys
import tempfile

# Some environments forbid bytecode: every process that tests start would then compile all of pybatch again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell ignores Ctrl-C for what it starts in the background, and children inherit that: tests of it would hang.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before torch is imported: on a shared machine spinning threads slow small steps a hundredfold.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # for torch and what tests start; who needs more threads sets them
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))

import pytest
import seconds
from cases import warm

from pybatch import records as r

sys.dont_write_bytecode = False
CORES = len(os.sched_getaffinity(0))
MOST_WORKERS = 8  # each imports torch: half a gigabyte
TOGETHER = {  # they ask the same processes, or what the same compiler made
    "tests/noise/test_closures.py": "tests/noise/test_distributed.py",
    "tests/ptx/test_extremes.py": "tests/ptx/test_ptx.py",
    "tests/kernels/test_extremes.py": "tests/kernels/test_cuda_on_host.py",
    "tests/kernels/test_triton_per_example.py": "tests/kernels/test_triton.py",
    "tests/optim/test_triton.py": "tests/kernels/test_triton.py",
}


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Spread the tests over the cores where pytest-xdist is there, unless -n says otherwise; one file runs as it is."""
    option = config.option
    alone = len(config.args) == 1 and ".py" in config.args[0]
    if hasattr(config, "workerinput") or alone or getattr(option, "usepdb", False) or CORES == 1:
        return
    if getattr(option, "numprocesses", 0) is None and option.dist == "no":
        option.numprocesses, option.dist = min(CORES + 1, MOST_WORKERS), "loadfile"  # one more: some wait


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Files stay whole, so that what a file's tests share is made once; so do files that share processes."""
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return TOGETHER.get(file, file)

    config.option.loadscopereorder = False  # pytest_collection_modifyitems has ordered them
    return Files(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session):
    """Each worker first imports files of its own, whose rewritten assertions the others then find as bytecode."""
    if "PYTEST_XDIST_WORKER" in os.environ and session.config.args == ["tests"]:
        number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
        files = sorted((session.config.rootpath / "tests").rglob("test_*.py"))
        for file in files[number :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]:
            pytest.Module.from_parent(session, path=file).obj  # noqa: B018


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Slow is what the table says took long; the longest files come first, so that no core ends alone with one."""
    table, files = seconds.read(), {}
    for item in items:
        file = item.location[0]
        unit = files.setdefault(TOGETHER.get(file, file), {})
        found = seconds.of(item, table)
        if found:
            item.add_marker(pytest.mark.slow)
        unit |= found or {item.nodeid: seconds.OTHERS}
    if "PYTEST_XDIST_WORKER" in os.environ:
        whole = {file: sum(unit.values()) for file, unit in files.items()}
        items.sort(key=lambda item: -whole[TOGETHER.get(item.location[0], item.location[0])])


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write tests/report/golden anew")
    parser.addoption("--update-seconds", action="store_true", help="write tests/seconds.json of the files that run")


def pytest_configure(config):
    if config.getoption("--update-seconds"):
        config.pluginmanager.register(seconds.Recorder())


@pytest.fixture(autouse=True)
def _no_watch_is_left():
    """A watched pass that was cut in the middle must not watch the next test's."""
    yield
    overrides = sys.modules.get("torch.overrides")
    while overrides is not None and (stack := overrides._get_current_function_mode_stack()):
        if not type(stack[-1]).__module__.startswith("pybatch."):
            break
        stack[-1].__exit__(None, None, None)


@pytest.fixture(autouse=True)
def _nothing_is_chosen_yet():
    """Whether a stack or a loop trains faster is asked in each test: how often a workload is called depends on it."""
    choosing = sys.modules.get("pybatch.training.choosing")
    if choosing is not None:
        choosing._chosen.clear()


@pytest.fixture(autouse=True)
def _no_hook_is_left():
    """Hooks on every module of the process, as a watch puts them on, end with the test."""
    yield
    modules = sys.modules.get("torch.nn.modules.module")
    if modules is not None and modules._has_any_global_hook():
        for name, hooks in vars(modules).items():
            if name.startswith(("_global_forward_", "_global_backward_")):
                hooks.clear()
        pytest.fail("a hook on every module was left on")


@pytest.fixture(autouse=True, scope="session")
def _freed_memory_goes_back():
    """Commands that run inside the tests' process must not set how it frees memory: other tests measure that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pybatch.device.memory.keep_freed", lambda: None)
        yield


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory):
    """What stands for `sys.executable` in a command where torch may have been imported before: see `cases.warm`."""
    python = tmp_path_factory.mktemp("warm") / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:  # of a short name: that of a socket has 108 characters at most
        server = os.path.join(folder, "socket")
        warm.executable(python, server)
        with subprocess.Popen(
            [sys.executable, warm.__file__, "serve", server], stdout=subprocess.PIPE, env=environment
        ) as process:
            assert process.stdout.readline() == b"serving\n", "the server of warm processes did not start"
            yield str(python)
            process.kill()


@pytest.fixture
def warm_children(warm_python, monkeypatch):
    """pybatch's own children begin with torch imported."""
    monkeypatch.setattr(sys, "executable", warm_python)


@pytest.fixture
def one_thread():
    """For models of a few kilobytes: a second thread only waits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fit():
    return r.ThroughputFit(
        model="affine",
        t0_s=2e-3,
        alpha_s=2e-3,
        beta_s=1e-4,
        ceiling=10_000.0,
        ceiling_low=9_800.0,
        ceiling_high=10_300.0,
        half_batch=20.0,
        half_low=18.0,
        half_high=22.0,
        saturation_batch=190.0,
        saturation_low=171.0,
        saturation_high=209.0,
        gain=0.05,
        rms_log_error=0.01,
        batches=4,
    )


@pytest.fixture
def run(fit):
    points = tuple(
        r.BatchPoint(
            batch=batch,
            status="ok",
            step_ms=1e3 * fit.step_s(batch),
            step_ms_low=0.99e3 * fit.step_s(batch),
            step_ms_high=1.02e3 * fit.step_s(batch),
            samples_per_s=batch / fit.step_s(batch),
            model_flops=1e6 * batch,
            mfu_measured=0.123,
            memory_bytes=3 * 2**20,
            samples=25,
        )
        for batch in (1, 8, 64, 512)
    )
    capacity = r.Capacity(
        t0_ms=2.0,
        ceiling_samples_per_s=10_000.0,
        half_batch=20.0,
        saturation_batch=190.0,
        saturation_low=171.0,
        saturation_high=209.0,
        saturation_measured=512,
        max_batch=81_920,
        max_batch_verified=True,
        model=fit,
        drift=0.012,
        notes=(r.Note("batches.sm_active", "the CPU has no streaming multiprocessors"),),
        device=r.Device("cpu", 0, "Example CPU", 2**34, cores=2),
        ceilings=r.Ceilings(1e11, 2e10),
        workload=r.WorkloadInfo("digits", "images", 4810, "fp32", model="mlp", examples=1437, learning_rate=1e-3),
        batches=(*points, r.BatchPoint(batch=2**20, status="predicted_oom", reason="needs 40 GiB, 12 GiB are free")),
    )
    noise = r.NoiseScale(
        b_simple=40.0,
        low=31.0,
        high=52.0,
        grad_sq=0.5,
        trace=20.0,
        status="resolved",
        source="micro-batches",
        steps=512,
        small_batch=8.0,
        large_batch=128.0,
        warmup_steps=100,
        loss=0.41,
        learning_rate=1e-3,
        layers=(r.LayerNoise("0.weight", 12.0, 0.1, 1.2),),
    )
    verdict = r.Verdict(
        critical_batch=40.0,
        critical_low=31.0,
        critical_high=52.0,
        critical_source="noise",
        saturation_batch=190.0,
        best_batch=32,
        best_low=24.0,
        best_high=34.0,
        limit="noise",
        useful_devices=1,
        time_to_target=None,
        text="Use batch 32.",
        reasons=(r.Reason("best_batch", "the batch of least modelled time", "modelled", {"critical_batch": 40.0}),),
        notes=(r.Note("verdict.time_to_target", "steps to target were not measured"),),
    )
    environment = r.Environment(
        python="3.11.7",
        platform="Linux",
        pybatch="0.1.0",
        torch="2.13.0",
        commit=None,
        driver=None,
        cuda=None,
        threads=2,
        seed=0,
        command="pybatch bench",
    )
    return r.Run("2026-01-02T03:04:05+00:00", environment, capacity, noise, None, verdict)
