"""Backends: chosen by device, refused with the reason and the remedy."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pybatch import _C, ops
from pybatch.base.errors import DeviceError, UsageError

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


def test_cpu_tensors_get_the_cpp_backend():
    assert ops.choose_backend(None, CPU).name == "cpp"
    assert ops.choose_backend("cpp", CPU).name == "cpp"


def test_cuda_tensors_get_cuda_or_its_twin():
    assert ops.choose_backend(None, CUDA).name == ("cuda" if _C.cuda else "triton")


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("cuda", CPU, "CUDA tensors, these are on cpu. Move the model, or use 'cpp'"),
        ("cpp", CUDA, "CPU tensors, these are on cuda:0. Use 'cuda' or 'triton'"),
        ("triton", CPU, "TRITON_INTERPRET=1"),
        ("triton", torch.device("meta"), "CUDA and XPU tensors, these are on meta. Move the model"),
    ],
)
def test_backend_that_can_not_work_says_why_and_what_to_do(name, device, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(DeviceError, match=message):
        ops.choose_backend(name, device)


def test_cuda_backend_of_a_cpu_build_says_how_to_get_one(monkeypatch):
    monkeypatch.setattr(
        ops.backends, "core", type("Fake", (), {"cuda": False, "cuda_reason": "built where nvcc was not found"})
    )
    with pytest.raises(DeviceError, match=r"nvcc was not found. Reinstall with nvcc on PATH, or use 'triton'"):
        ops.choose_backend("cuda", CUDA)


def test_triton_launches_on_the_device_of_the_tensors(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())

    def launch(name):
        return lambda tensors, call: entered.append(name)

    step, accumulate = (pytest.importorskip(f"pybatch.kernels.{name}") for name in ("step", "accumulate"))
    for name in ("step", "norm", "prepare", "update"):
        monkeypatch.setattr(step, name, launch(name))
    monkeypatch.setattr(accumulate, "accumulate", launch("accumulate"))
    device = torch.device("cuda:1")
    tensors = SimpleNamespace(
        device=device,
        send=lambda: entered.append("send"),
        row_norms=False,
        prepare=True,
        ledger=ops.Ledger(CPU),
        norms="norms",
        layers=None,
    )
    backend, call = ops.TritonBackend(), ops.Call()

    def launched(work):
        entered.clear()
        work()
        return entered

    assert launched(lambda: backend.step(tensors, call)) == [device, "send", "step"]
    assert launched(lambda: backend.accumulate(tensors, call)) == [device, "send", "accumulate"]
    call.norm = True
    names = launched(lambda: backend.step(tensors, call, lambda sums: entered.append(sums[-1])))
    assert names == [device, "send", "norm", "norms", device, "send", "prepare", "norms", device, "send", "update"]


def test_unknown_backend():
    with pytest.raises(UsageError, match=r"backend 'rocm' is not known. Use one of: cpp, cuda, triton"):
        ops.choose_backend("rocm", CPU)


@pytest.mark.skipif(not _C.cuda, reason="built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_part_without_a_device_gives_the_drivers_error():
    code = -_C.cuda_devices()
    assert code > 0
    name, text = _C.cuda_error(code)
    assert name.startswith("cudaError")
    assert text


def test_build_describes_itself():
    build = ops.build()
    assert build.cpu_width in {"portable", "avx2", "avx512"}
    assert (build.cuda_architectures is None) == (not build.cuda) == (build.cuda_reason is not None)


def test_ledger_of_another_version_is_refused():
    ledger = ops.Ledger(CPU)
    with pytest.raises(UsageError, match=r"'ring' has shape \(8, 3\)"):
        ledger.load_state_dict(ledger.state_dict() | {"ring": torch.zeros(8, 3)})


def test_a_table_is_uploaded_only_where_it_changed():
    params = [torch.ones(3), torch.ones(2)]
    entries = [ops.Entry(p, (), "Sgd", 0, 0.0) for p in params]
    tensors = ops.TensorList(entries, 1, ops.Ledger(CPU), ops.CppBackend.chunk)
    tensors.send()
    tensors.set("grad", [p.data_ptr() for p in params])
    assert tensors._stale
    tensors.send()
    tensors.set("grad", np.array([p.data_ptr() for p in params]))
    assert not tensors._stale


def test_a_rule_that_needs_norms_gets_them_from_the_call():
    p, g = torch.ones(3), torch.ones(3)
    for rule, norm, prepare in (("Sgd", False, False), ("Lars", True, False), ("Lamb", False, True)):
        states = tuple(torch.zeros(3) for _ in range(ops.RULES[rule].states))
        tensors = ops.TensorList([ops.Entry(p, states, rule, 0, 0.0)], 1, ops.Ledger(CPU), ops.CppBackend.chunk)
        tensors.set("grad", [g.data_ptr()])
        call = ops.Call()
        call.inverse = 1.0
        ops.CppBackend().step(tensors, call)
        assert (call.norm, call.row_norms, call.prepare) == (norm, norm, prepare)
