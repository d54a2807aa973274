"""`torchrun -m pybatch bench` on two gloo processes: one result, from both."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from cases import warm
from cases.patience import with_time

import pybatch
from pybatch.base.errors import UsageError
from pybatch.capacity.distributed import launched, measure_distributed, process_group
from pybatch.capacity.exploration import OUT_OF_TIME
from pybatch.jobs.distributed import _per_device
from pybatch.records import Run
from pybatch.workloads.running.finding import find


def torchrun(python, folder, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", warm.CHILDREN: python}
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pybatch"]
    return subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun")

    def measured(budget):
        typed = ["bench", "--cpu", "--batch", "8,128", "--time-budget", f"{budget:g}", "-o", "run.json"]
        done = torchrun(sys.executable, folder, *typed)
        assert (folder / "run.json").exists(), done.stderr
        return done, Run.from_json((folder / "run.json").read_text())

    return with_time(measured, lambda found: len({p.batch for p in found[1].distributed.points}) == 2, 15)


def test_process_0_alone_prints_and_writes(bench):
    done, run = bench
    assert done.stdout.count("Several devices (gloo)") == 1
    assert done.stdout.count("Verdict") == 1
    assert run.distributed.devices == 2


def test_steps_with_and_without_communication_are_told_apart(bench):
    done, run = bench
    points, fit = run.distributed.points, run.distributed.fit
    assert {p.devices for p in points} == {2}
    assert len({p.batch for p in points}) >= 2, done.stdout
    assert all(p.step_ms > 0 and p.compute_ms > 0 for p in points)
    assert fit.bytes == 4 * 4810  # the gradient of digits' MLP in fp32
    assert fit.gamma >= 1
    assert fit.latency_s > 0
    assert any("share this machine" in note.text for note in run.distributed.notes)


def test_where_time_ran_out_alone_what_was_asked_for_is_timed_together(bench):
    run = replace(bench[1], verdict=None)
    point = run.capacity.batches[0]

    def ran(skipped=None, **statuses):
        points = tuple(
            replace(point, batch=int(n[1:]), status=status, reason=skipped if status == "skipped" else None)
            for n, status in statuses.items()
        )
        return replace(run, capacity=replace(run.capacity, batches=points))

    assert _per_device(ran(b8="ok", b128="ok", b512="oom"), (4,)) == [8, 128]
    assert _per_device(ran(), (512, 128, 8)) == [8, 128]
    assert _per_device(ran(b128="oom", b512="predicted_oom"), (512, 128, 8)) == [8]
    assert _per_device(ran(b8="oom"), (8,)) == []
    late = ran(OUT_OF_TIME, b8="ok", b128="skipped")
    assert _per_device(late, (8, 128)) == [8, 128]
    assert _per_device(late, (1, 2, 8, 128)) == [1, 8]
    refused = ran("BatchNorm needs two", b1="skipped", b64="ok")
    assert _per_device(refused, (1, 64)) == [64]
    assert _per_device(ran(b8="ok", b128="predicted_oom"), (8, 128)) == [8]
    assert _per_device(ran(b8="ok"), ()) == [8]
    assert _per_device(replace(run, capacity=None), (512, 128, 8)) == [8, 128]


def test_an_error_in_process_0_ends_both(tmp_path, warm_python):
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import torch, pybatch\n"
        "class Broken(pybatch.Workload):\n"
        "    name, unit = 'broken', 'x'\n"
        "    def model(self): return torch.nn.Linear(2, 1)\n"
        "    def batch(self, n, generator, split='train'): raise ValueError('no data here')\n"
        "    def loss(self, model, batch): return model(batch).mean()\n"
    )
    done = torchrun(warm_python, tmp_path, "bench", "--cpu", "--workload", "broken.py:Broken")
    assert done.returncode != 0
    assert done.stderr.count("no data here") >= 1


def test_one_process_has_nobody_to_communicate_with(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with pytest.raises(UsageError, match="torchrun --nproc-per-node"):
            measure_distributed(
                find("digits"), device=torch.device("cpu"), dtype="fp32", batches=[8], time_budget=1.0, seed=0
            )
    finally:
        dist.destroy_process_group()


def test_every_process_works_on_its_own_gpu_before_it_joins(monkeypatch):
    """NCCL refuses two processes on one GPU, and that is where the current device is unless it is set."""
    done = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(str(device)))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: done.append(backend))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("left"))
    with process_group(torch.device("cuda", 1)) as rank:
        assert rank == 1
    assert done == ["cuda:1", "nccl", "left"]
    done.clear()
    with process_group(torch.device("cpu")):
        pass
    assert done == ["gloo", "left"]


def test_one_process_is_not_a_group():
    assert not launched()
    assert json.loads(pybatch.Run("", None).to_json())["distributed"] is None
