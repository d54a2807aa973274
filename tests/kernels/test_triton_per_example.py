"""The Triton kernels of per-example norms in the interpreter, against float64; and compiled for a GPU."""

import pytest
from cases import for_sm_90, interpreter

pytest.importorskip("triton")


SETUP = """
import torch
from pybatch.kernels import per_example as k
from torch.testing import assert_close

torch.manual_seed(0)

def draw(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)
"""

PRODUCTS = """
for n, g, t, r, c in ((3, 1, 70, 5, 33), (2, 2, 3, 65, 7), (2, 1, 64, 64, 64), (1, 1, 130, 3, 2)):
    for dtype in (torch.float32, torch.float16):  # the interpreter has no product of bf16
        rows, cols = draw(n, g, t, r, dtype=dtype), draw(n, g, c, t, dtype=dtype).mT  # of any strides
        exact = rows.double().mT @ cols.double()
        sq = exact.square().sum((1, 2, 3))
        assert_close(k.gram(rows, cols), sq, rtol=1e-5, atol=0.0)
        assert_close(k.weight(rows, cols)[0], sq, rtol=1e-6, atol=0.0)
        for runs in (1, 2, n):
            found, total = k.weight(rows, cols, runs)
            assert_close(found, sq, rtol=1e-6, atol=0.0)
            assert_close(total.double(), exact.sum(0), rtol=1e-5, atol=1e-4)
        one = rows[:, :, :1].double().mT @ cols[:, :, :1].double()
        assert_close(k.single(rows[:, :, :1], cols[:, :, :1]), one.square().sum((1, 2, 3)), rtol=1e-6, atol=0.0)
"""

LARGE = """
plain = k.feeds_large_tiles
for r, c, t in ((128, 130, 200), (300, 128, 128), (127, 200, 130)):
    rows, cols = draw(2, 1, t, r, dtype=torch.float16), draw(2, 1, t, c, dtype=torch.float16)
    exact = rows.double().mT @ cols.double()
    sq = exact.square().sum((1, 2, 3))
    for large in (False, True)[t < 200 :]:
        k.feeds_large_tiles = lambda device: large
        cut = k.tiling(rows, r, c)
        assert cut is (k.LARGE if large and r >= 128 else k.SMALL)
        assert_close(k.gram(rows, cols), sq, rtol=1e-5, atol=0.0)
        found, total = k.weight(rows, cols, 1)  # one run over both examples
        assert_close(found, sq, rtol=1e-6, atol=0.0)
        assert_close(total.double(), exact.sum(0), rtol=1e-5, atol=1e-3)
    assert k.tiling(rows.float(), r, c) is k.SMALL  # no matrix units to feed
k.feeds_large_tiles = plain
"""

PICKED = """
for n, t, c in ((3, 9, 5), (2, 1, 4), (2, 6, 1100)):
    index, values = torch.randint(4, (n, t)), draw(n, c, t).mT
    index[0] = 3
    dense = torch.zeros(n, 4, c, dtype=torch.float64)
    dense.scatter_add_(1, index[..., None].expand(-1, -1, c), values.double())
    assert_close(k.picked(index, values), dense.square().sum((1, 2)), rtol=1e-6, atol=0.0)

# A long document: only the first dimension of a CUDA grid takes more than 65 535 programs.
grids = []

class Grids:
    def __getitem__(self, grid):
        grids.append(grid)
        return lambda *args, **options: None

kernel, k.picked_kernel = k.picked_kernel, Grids()
k.picked(torch.zeros(2, 70_000, dtype=torch.int64), draw(2, 70_000, 1))
k.picked_kernel = kernel
assert grids == [(140_000,)]
"""

NORMS = """
from torch.nn import functional as F

for n, t, width, runs in ((3, 5, 7, 2), (2, 1, 16, 4), (2, 6, 33, 3)):
    for centred in (True, False):
        for affine in (True, False):
            x, grad, weight = draw(n, t, width), draw(n, t, width), draw(width) if affine else None
            dx, scaled, plain = k.norm_backward(grad, x, weight, 1e-3, centred, runs)
            leaf = x.double().requires_grad_()
            w = None if weight is None else weight.double()
            if centred:
                out, normal = F.layer_norm(leaf, (width,), w, None, 1e-3), F.layer_norm(leaf, (width,), eps=1e-3)
            else:
                out, normal = F.rms_norm(leaf, (width,), w, 1e-3), F.rms_norm(leaf, (width,), eps=1e-3)
            out.backward(grad.double())
            assert_close(dx.double(), leaf.grad, rtol=1e-5, atol=1e-5)
            assert_close(scaled.double(), (grad.double() * normal).sum(1).detach(), rtol=1e-5, atol=1e-5)
            assert_close(plain.double(), grad.double().sum(1), rtol=1e-5, atol=1e-5)
"""

MODEL = """
from cases.noise_models import Transformer, cnn, cross_entropy, measured, squared_error

images = torch.randn(2, 3, 6, 6)
net = cnn()
net(images)  # lazy shapes
for model, x, y, loss in (
    (Transformer(), torch.randint(11, (3, 6)), torch.randint(11, (3, 6)), cross_entropy),
    (net, images, torch.randn(2, 4), squared_error),
):
    for route in ("gram", "weight", "fused") if loss is cross_entropy else ("auto",):
        a, b = (measured(model, x, y, loss, route=route, backend=name) for name in ("torch", "triton"))
        assert a.by_parameter.keys() == b.by_parameter.keys()
        for name in a.by_parameter:
            assert_close(a.mean_sq[name], b.mean_sq[name], rtol=1e-4, atol=1e-8)
            assert_close(a.by_parameter[name], b.by_parameter[name], rtol=1e-4, atol=1e-8)
"""


PROGRAMS = {"products": PRODUCTS, "large": LARGE, "picked": PICKED, "norms": NORMS, "model": MODEL}


@pytest.fixture(scope="module")
def failures():
    return interpreter.run({name: SETUP + program for name, program in PROGRAMS.items()})


@pytest.mark.parametrize("name", PROGRAMS)
def test_in_the_interpreter(failures, name):
    assert not failures[name]


def test_every_kernel_compiles_for_a_gpu(tmp_path, monkeypatch):
    from pybatch.kernels import per_example as k

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fixed = {"partials": "*fp64", "total": "*fp32", "scaled": "*fp32", "plain": "*fp32", "ordered": "*i64"}
    fixed |= {"order": "*i64", "eps": "fp32"}

    def build(kernel, data, warps=4, **constants):
        types = fixed | dict.fromkeys(["rows", "cols", "values", "grad", "x", "weight", "dx"], data)
        return for_sm_90.compile_kernel(kernel, types, warps, **constants)

    def cut(kernel, data, tiling, **constants):
        made = build(kernel, data, tiling.warps, block=tiling.tile, step=tiling.step, **constants)
        if data == "*bf16":
            assert "wgmma" in made.asm["ptx"]
        assert made.metadata.shared <= 227 << 10

    for data in ("*fp32", "*bf16"):
        cut(k.gram_kernel, data, k.SMALL)
        cut(k.weight_kernel, data, k.SMALL, summed=True)
    cut(k.gram_kernel, "*bf16", k.LARGE)
    for summed in (False, True):
        cut(k.weight_kernel, "*bf16", k.LARGE, summed=summed)
    build(k.single_kernel, "*bf16", block=1024)
    build(k.picked_kernel, "*bf16", block=1024)
    build(k.norm_backward_kernel, "*bf16", centred=True, affine=True, block=1024)
    build(k.norm_backward_kernel, "*fp32", centred=False, affine=True, block=1024)
