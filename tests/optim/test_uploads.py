"""What a step sends to a device and launches there, counted on a simulated one that does not read the host's memory."""

import shutil

import pytest
import torch
from cases import host_cuda

from pybatch import ops, optim
from pybatch.base.errors import UsageError
from pybatch.ops import tensors

SIZES = pytest.mark.parametrize("count", [1, 148, 1000, 10_000])

# The entry points of the CUDA part as they are, over launches that are counted and do nothing.
COUNTING = """
#define PB_CUDA
#include "step_cuda.cpp"
static unsigned launches;
namespace pybatch::PB_ISA {
#define PB_LAUNCH(NAME) cudaError_t NAME(const Table&, const Call&, cudaStream_t) { ++launches; return cudaSuccess; }
PB_LAUNCH(launch_norm) PB_LAUNCH(launch_prepare) PB_LAUNCH(launch_update) PB_LAUNCH(launch_accumulate)
PB_LAUNCH(launch_narrow_prepare) PB_LAUNCH(launch_narrow_update)
}
#define PB_EXPORT(NAME) \\
    extern "C" __attribute__((visibility("default"))) \\
    int host_##NAME(const pybatch::Table* t, const pybatch::Call* c, bool, unsigned* n) { \\
        launches = 0; \\
        const int error = pybatch::cuda_##NAME(*t, *c, nullptr); \\
        *n = launches; \\
        return error; \\
    }
PB_EXPORT(norm) PB_EXPORT(prepare) PB_EXPORT(update) PB_EXPORT(step) PB_EXPORT(accumulate)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler on PATH")
    folder = tmp_path_factory.mktemp("counting")
    (folder / "counting.cpp").write_text(COUNTING)
    return host_cuda.compile_kernels(folder / "counting.cpp")


class Counted:
    """Uploads and launches since they were last asked for."""

    def __init__(self):
        self.uploads, self.launches = [], []

    def __call__(self):
        seen = len(self.uploads), len(self.launches)
        self.uploads.clear()
        self.launches.clear()
        return seen


@pytest.fixture
def counted(library, monkeypatch):
    found = Counted()

    class Device(host_cuda.HostCuda):
        chunk = 32768

        def __init__(self):
            super().__init__(library)

        def _run(self, entry, listed, call):
            listed.send()
            super()._run(entry, listed, call)
            found.launches.extend([entry] * self.launches)

    def upload(values, device):
        found.uploads.append(values)
        return values.clone()

    monkeypatch.setitem(ops.BACKENDS, "cpp", Device)
    monkeypatch.setattr(tensors, "reads_host", lambda device: False)
    monkeypatch.setattr(tensors, "upload", upload)
    return found


def training(count, micro_batches=1, **options):
    """An optimizer, and a function that gives every parameter the gradient of a micro-batch in its place."""
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(count)]
    grads = [[torch.ones(2) for _ in params] for _ in range(micro_batches)]

    def give(micro=0):
        for p, g in zip(params, grads[micro], strict=True):
            p.grad = g

    return optim.AdamW(params, **options), give


@SIZES
def test_a_step_sends_nothing_where_nothing_moved(counted, count):
    opt, give = training(count, max_grad_norm=1.0)
    give()
    opt.step()
    assert counted() == (2, 2)  # the table and the hyper-parameters; the norm and the update
    for _ in range(2):
        opt.step()
        assert counted() == (0, 2)
    opt.param_groups[0]["lr"] = 0.5
    opt.step()
    assert counted() == (1, 2)


@SIZES
def test_accumulating_sends_nothing_where_gradients_come_back_to_their_places(counted, count):
    opt, give = training(count, micro_batches=3, max_grad_norm=1.0, noise=True)
    for step in range(3):
        for micro in range(3):
            give(micro)
            opt.accumulate(4)
        opt.step()
        uploads, launches = counted()
        assert launches == 4  # three micro-batches, whose norms serve the update
        assert uploads == (0 if step else 4)  # each micro-batch's table, the last also the step's; hyper-parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_accumulation_is_captured_where_nothing_moved(counted, monkeypatch, dtype):
    """16-bit gradients are not their own sum: it, too, is where it was. What moved is refused before it is launched."""
    params = [torch.nn.Parameter(torch.ones(2, dtype=dtype)) for _ in range(20)]
    grads = [[torch.ones_like(p) for p in params] for _ in range(3)]
    opt = optim.AdamW(params, max_grad_norm=1.0, noise=True)

    def step():
        for micro in grads:
            for p, g in zip(params, micro, strict=True):
                p.grad = g
            opt.accumulate(4)
        opt.step()

    step()
    counted()
    monkeypatch.setattr(tensors, "capturing", lambda device: True)
    monkeypatch.setattr(torch, "as_tensor", None)  # what an upload is made by
    step()
    assert counted() == (0, 4)
    listed = opt._tables.first
    assert set(listed._captured) <= {table.data_ptr() for table in listed._sent.values()}
    assert len(listed._captured) == 3  # the last one also serves the step
    grads[1][5] = grads[1][5].clone()
    with pytest.raises(UsageError, match="capture of a CUDA graph: a gradient, a sum or a parameter is in another"):
        step()
    assert counted() == (0, 1)


def test_accumulating_sends_tables_alone_and_by_way_of_pinned_memory(counted, monkeypatch):
    """Gradients in several buckets: which rows a bucket holds is sent once, and nothing passes by `upload`."""
    monkeypatch.setattr("pybatch.optim._engine.accumulation.BUCKET_BYTES", 3 * 8)
    opt, _ = training(10, max_grad_norm=1.0, noise=True)
    params = opt._params()
    for step in range(3):
        if step:
            monkeypatch.setattr(torch, "as_tensor", None)
        for _ in range(2):
            with opt.accumulating(4):
                sum(p.sum() for p in params).backward()
        opt.step()
        indices = [values for values in counted.uploads if values.dim() == 1]
        assert (len(indices) > 0) == (step == 0)
        assert counted()[1] >= 2 * 4 + 1


def test_a_gradient_that_moved_is_sent(counted):
    opt, give = training(5)
    give()
    opt.step()
    counted()
    opt._params()[3].grad = torch.full((2,), 3.0)
    opt.step()
    assert counted() == (1, 1)
    listed = opt._tables.first
    assert listed.table.rows == listed.rows.data_ptr()
    assert int(listed.rows[3][tensors.core.columns["grad"]]) == opt._params()[3].grad.data_ptr()
    give()
    opt.step()  # back in the place of before: the table of then is there still
    assert counted() == (0, 1)
    assert listed.table.rows == listed.rows.data_ptr()
    assert int(listed.rows[3][tensors.core.columns["grad"]]) == opt._params()[3].grad.data_ptr()


def test_no_more_tables_are_kept_than_said(counted):
    opt, _ = training(2)
    params, held = opt._params(), []
    for _ in range(3 * tensors.MAX_TABLES):
        for p in params:
            p.grad = torch.ones(2)
            held.append(p.grad)
        opt.step()
    assert len(opt._tables.first._sent) == tensors.MAX_TABLES
    params[0].grad = held[0]
    params[1].grad = held[1]
    counted()
    opt.step()
    assert counted()[0] == 1  # too long ago
