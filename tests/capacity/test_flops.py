"""FLOPs of a step against closed forms, where torch's own counter is wrong or has nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from pybatch.capacity.flop_formulas import holds_products
from pybatch.capacity.flops import count_flops
from pybatch.capacity.traffic import Traffic


def normal(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, requires_grad=grad)


def backward(made: Tensor) -> None:
    made.sum().backward()  # type: ignore[no-untyped-call]


def exactly(work: Callable[[], object], want: int) -> None:
    assert count_flops(work) == (want, None)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_each_multiply_add_of_a_convolution_has_two_backward(groups: int, transposed: bool, dimensions: int) -> None:
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dimensions}d")
    conv = kind(8, 16, 3, stride=2, padding=1, groups=groups)
    x = normal(2, 8, *[6] * dimensions)
    places = 6**dimensions if transposed else 3**dimensions  # of the input, or of the output
    exactly(lambda: backward(conv(x)), 3 * 2 * 2 * places * 8 * 16 // groups * 3**dimensions)
    exactly(lambda: backward(conv(x.detach())), 2 * 2 * 2 * places * 8 * 16 // groups * 3**dimensions)


SPARSE = torch.eye(64)[:40]  # 40 numbers of 40 x 64


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", ["coo", "csr", "csc"])
def test_a_sparse_product_counts_the_numbers_it_stores(layout: str) -> None:
    a = SPARSE.to_sparse() if layout == "coo" else getattr(SPARSE, f"to_sparse_{layout}")()
    w, v, bias = normal(64, 5), normal(64), normal(40, 5)
    exactly(lambda: backward(torch.sparse.mm(a, w)), 2 * 2 * 40 * 5)  # forward, and the gradient of w
    exactly(lambda: backward(a @ w), 2 * 2 * 40 * 5)
    exactly(lambda: a @ v.detach(), 2 * 40)
    exactly(lambda: torch.sparse.addmm(bias.detach(), a, w.detach()), 2 * 40 * 5)
    if layout == "csr":
        exactly(lambda: torch.sparse.mm(a, w.detach(), "mean"), 2 * 40 * 5)
        exactly(lambda: torch.sparse.sampled_addmm(a, normal(40, 3).detach(), normal(3, 64).detach()), 2 * 40 * 3)
        exactly(lambda: w.detach().T @ a.t(), 2 * 40 * 5)
    if layout != "csc":
        flops, reason = count_flops(lambda: torch.sparse.mm(a, SPARSE.T.to_sparse(layout=a.layout)))
        assert flops is None  # depends on where the numbers are
        assert reason is not None


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_the_gradient_of_a_sparse_matrix_counts_the_numbers_it_keeps(layout: str) -> None:
    a = (SPARSE.to_sparse().coalesce() if layout == "coo" else SPARSE.to_sparse_csr()).requires_grad_()
    w, v = normal(64, 5), normal(64)
    exactly(lambda: backward(torch.sparse.mm(a, w)), 3 * 2 * 40 * 5)
    exactly(lambda: backward(torch.sparse.addmm(normal(40, 5), a, w)), 3 * 2 * 40 * 5)
    exactly(lambda: backward(torch.sparse.mm(a, w.detach())), 2 * 2 * 40 * 5)
    # By the operator torch forms the gradient at every place, and keeps it so.
    exactly(lambda: torch.autograd.grad((a @ w).sum(), [a, w]), 2 * 2 * 40 * 5 + 2 * 40 * 64 * 5)
    exactly(lambda: torch.autograd.grad((a @ v).sum(), [a, v]), 2 * 2 * 40 + 2 * 40 * 64)
    dense = normal(40, 64).detach()
    exactly(lambda: dense.sparse_mask(a.detach()), 0)


def test_a_sparse_step_has_its_bytes_counted() -> None:
    a, w = SPARSE.to_sparse(), normal(64, 5)
    with Traffic() as traffic:
        _ = a @ w
    assert traffic.bytes == 40 * (2 * 8 + 4) + 4 * (64 * 5 + 40 * 5)  # two indices and a number each


def test_products_with_vectors() -> None:
    w, v, u = normal(6, 5), normal(5), normal(6)
    exactly(lambda: backward(w @ v), 3 * 2 * 6 * 5)  # as a linear layer of one example
    exactly(lambda: backward(w @ v.detach()), 2 * 2 * 6 * 5)
    exactly(lambda: backward(w.T @ u.detach()), 2 * 2 * 6 * 5)
    exactly(lambda: v.detach() @ v.detach(), 2 * 5)
    exactly(lambda: torch.addmv(u, w, v), 2 * 6 * 5)
    exactly(lambda: torch.addr(w, u, v), 2 * 6 * 5)
    exactly(lambda: w.detach().clone().addmm_(normal(6, 3).detach(), normal(3, 5).detach()), 2 * 6 * 3 * 5)
    exactly(lambda: torch.addbmm(w, normal(2, 6, 3), normal(2, 3, 5)), 2 * 2 * 6 * 3 * 5)


def test_a_bilinear_form_counts_the_larger_of_its_two_products_for_each_of_its_arguments() -> None:
    layer, x, y = nn.Bilinear(3, 4, 5), normal(7, 3), normal(7, 4)
    exactly(lambda: layer(x, y), 2 * 7 * 3 * 4 * 5)
    exactly(lambda: backward(layer(x, y)), 4 * 2 * 7 * 3 * 4 * 5)
    exactly(lambda: backward(layer(x.detach(), y.detach())), 2 * 2 * 7 * 3 * 4 * 5)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_distances(p: float) -> None:
    a, b = normal(2, 4, 6), normal(2, 5, 6)
    exactly(lambda: torch.cdist(a, b, p), 2 * 2 * 4 * 5 * 6)
    exactly(lambda: backward(torch.cdist(a, b, p)), 3 * 2 * 2 * 4 * 5 * 6)
    exactly(lambda: backward(F.pdist(a[0], p)), 3 * 2 * 6 * 6)  # six pairs


@pytest.mark.parametrize("heads", [4, 2])
def test_attention_counts_two_products_forward_and_four_backward(heads: int) -> None:
    """What a fused kernel forms again is no work of the model: by products of its own it counts the same."""
    q, k, v = normal(2, 4, 16, 8), normal(2, heads, 12, 8), normal(2, heads, 12, 8)
    want = 3 * (2 * 2 * 2 * 4 * 16 * 12 * 8)
    exactly(lambda: backward(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)), want)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exactly(lambda: backward(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)), want)


LAYERS = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)))
CHECKPOINTED: list[Callable[[Tensor], Tensor]] = [
    lambda x: checkpoint(LAYERS, x, use_reentrant=False),
    lambda x: checkpoint(LAYERS, x, use_reentrant=True),
    lambda x: checkpoint_sequential(LAYERS, 2, x, use_reentrant=False),
    lambda x: checkpoint(lambda y: checkpoint(LAYERS, y, use_reentrant=False).tanh(), x, use_reentrant=False),
    lambda x: checkpoint(lambda y: checkpoint(LAYERS, y, use_reentrant=True).tanh(), x, use_reentrant=True),
]


@pytest.mark.parametrize("run", CHECKPOINTED)
def test_what_checkpointing_runs_again_counts_once(run: Callable[[Tensor], Tensor]) -> None:
    x = normal(3, 8)
    exactly(lambda: backward(run(x)), 4 * 3 * 2 * 3 * 8 * 8)


def test_a_gradient_of_a_gradient_is_no_recomputation() -> None:
    """A gradient penalty: the product for the input's gradient, and two more to differentiate it."""
    layer, x = nn.Linear(8, 5, bias=False), normal(3, 8)

    def penalty(through: Callable[[Tensor], Tensor]) -> Tensor:
        (grad,) = torch.autograd.grad(through(x).square().sum(), x, create_graph=True)
        return grad.square()

    plain, reason = count_flops(lambda: backward(penalty(layer)))
    assert reason is None
    assert plain == 6 * 2 * 3 * 8 * 5
    kept, _ = count_flops(lambda: backward(penalty(lambda y: checkpoint(layer, y, use_reentrant=False))))
    assert kept == plain


@pytest.mark.parametrize(
    "through",
    [
        lambda x: F.normalize(x, dim=-1),
        lambda x: F.cosine_similarity(x, x.roll(1, 0)),
        lambda x: x.norm(2, -1),
        lambda x: torch.linalg.vector_norm(x, 1, dim=-1),
        lambda x: F.interpolate(x[None, None], scale_factor=2, mode="bilinear"),
        lambda x: F.layer_norm(x, (8,)),
        lambda x: torch.linalg.cross(x[:, :3], x[:, 3:6]),
        lambda x: x.to_sparse_csr().values(),
    ],
)
def test_element_wise_work_counts_nothing_and_loses_nothing(through: Callable[[Tensor], Tensor]) -> None:
    layer, x = nn.Linear(8, 8), normal(3, 8)
    exactly(lambda: through(layer(x)), 2 * 3 * 8 * 8)


def test_normalization_of_weights_and_of_what_they_give_leaves_the_products() -> None:
    layer, x = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), normal(3, 8)
    exactly(lambda: backward(F.normalize(layer(x), dim=-1)), 3 * 2 * 3 * 8 * 8)


def test_inference_mode_shows_other_operators_of_the_same_work() -> None:
    layer, x = nn.Linear(8, 8), normal(3, 8, grad=False)
    with torch.inference_mode():
        exactly(lambda: torch.matmul(layer(x), x.T), 2 * 3 * 8 * 8 + 2 * 3 * 8 * 3)


def test_names_tell_products_from_what_sounds_alike() -> None:
    for name in (
        "linalg_qr",
        "_fft_r2c",
        "_cudnn_rnn",
        "miopen_lstm",
        "_weight_int8pack_mm",
        "cholesky_solve",
        "hspmm",
    ):
        assert holds_products(name), name
    for name in ("upsample_bilinear2d", "_convert_indices_from_coo_to_csr", "linalg_vector_norm", "gammaln"):
        assert not holds_products(name), name


def test_the_first_recurrent_layer_has_no_gradient_of_data() -> None:
    """Two products forward, both again for the weights, and but for the first one's input for what went in."""
    layer = nn.LSTM(5, 8, batch_first=True)
    own, hidden = 2 * 3 * 7 * 4 * 8 * 5, 2 * 3 * 7 * 4 * 8 * 8
    exactly(lambda: backward(layer(normal(3, 7, 5, grad=False))[0]), 2 * own + 3 * hidden)
    exactly(lambda: backward(layer(normal(3, 7, 5))[0]), 3 * (own + hidden))


def test_a_complex_multiply_add_is_four_real_ones() -> None:
    a, b = (torch.randn(*shape, dtype=torch.cfloat, requires_grad=True) for shape in ((3, 4), (4, 5)))
    exactly(lambda: (a @ b).abs().sum().backward(), 3 * 8 * 3 * 4 * 5)


def test_jagged_sequences_count_the_tokens_they_hold() -> None:
    parts = [normal(2, 5), normal(3, 5)]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    layer = nn.Linear(5, 6)
    exactly(lambda: layer(jagged).values().sum().backward(), 3 * 2 * 5 * 5 * 6)
    with torch.no_grad(), Traffic() as traffic:
        layer(jagged)
    assert traffic.bytes == 4 * (5 * 5 + 5 * 6 + 6 + 5 * 6)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_strided_nested_tensors_have_no_count_and_a_reason() -> None:
    """They tell no sizes; asked for them, torch raises."""
    nested = torch.nested.nested_tensor([normal(2, 5), normal(3, 5)])
    count, why = count_flops(lambda: nn.Linear(5, 6)(nested))
    assert (count, why) == (None, "no FLOP formula for aten.linear")
    exactly(lambda: (2 * nested).relu(), 0)


def test_a_sharded_tensor_counts_what_this_process_computes() -> None:
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        a = distribute_tensor(torch.ones(4, 5), mesh, [Shard(0)])
        b = distribute_tensor(torch.ones(5, 6), mesh, [Replicate()])
        exactly(lambda: a @ b, 2 * 2 * 5 * 6)
    finally:
        torch.distributed.destroy_process_group()
