"""FLOPs of operators, a multiply-add as two: torch's table, and own formulas where that counts wrong or nothing.

torch 2.13 counts the weight gradient of a grouped convolution `groups` times over and a sparse product as a dense one,
and has nothing for matrix times vector, bilinear forms and distances. Its attention backward holds the scores that a
fused kernel forms again. A formula gets the operator's own arguments; None: what it does is not known from them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

Formula = Callable[..., int | None]
F = TypeVar("F", bound=Formula)

_aten = torch.ops.aten
FORMULAS: dict[Any, Formula] = {}

# A part of an operator's name that stands for products. Element-wise work (norms, interpolation, fused gates) and moves
# of data count nothing.
_PRODUCTS = re.compile(
    r".*(mm|mv|matmul|gemm)|.*attention|rnn|lstm|gru|convolution|conv(\dd)?|transformer|fft|linalg|cholesky|qr|"
    r"geqrf|ormqr|svd|eigh?|solve|inverse|linear|bilinear|trilinear|[cp]dist"
)
_ELEMENTWISE = {
    "linalg_vector_norm",
    "linalg_cross",
    "linalg_diagonal",
    "_linalg_check_errors",
    *(f"_thnn_fused_{kind}_cell{end}" for kind in ("lstm", "gru") for end in ("", "_backward", "_backward_impl")),
}


def holds_products(name: str) -> bool:
    """Whether an operator of torch by this name does work that counts."""
    return name not in _ELEMENTWISE and any(map(_PRODUCTS.fullmatch, name.strip("_").split("_")))


def known(packet: Any) -> bool:
    """Whether an operator has a formula."""
    return packet in FORMULAS or packet in flop_registry


def count(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int | None:
    """FLOPs of one call of an operator, by our formula before torch's; None where neither tells."""
    if packet in FORMULAS:
        return FORMULAS[packet](*args, **kwargs)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    return None


def masked(product: int, dense: Tensor, pattern: Tensor) -> int:
    """What a product of so many FLOPs is counted too much where a pattern's numbers alone are kept of it: below 0.

    The gradient of a sparse matrix is formed so, by a dense product.
    """
    return product * _stored(pattern) // dense.numel() - product


def _of(*names: str) -> Callable[[F], F]:
    def add(formula: F) -> F:
        for name in names:
            if hasattr(_aten, name):  # one that this version of torch lacks can't run either
                FORMULAS[getattr(_aten, name)] = formula
        return formula

    return add


@_of("mm", "mv", "bmm", "dot", "vdot")
def _product(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int | None:
    """a [..., m, k] times b [..., k, n], each also a vector; a sparse one by the numbers it stores. A complex
    multiply-add is four real ones."""
    each = 8 if a.is_complex() else 2
    if b.layout != torch.strided:
        return None if a.layout != torch.strided else _stored(b) * each * (prod(a.shape[:-1]) // prod(b.shape[:-2]))
    columns = b.shape[-1] if b.ndim > 1 else 1
    return each * columns * (_stored(a) if a.layout != torch.strided else a.numel())


def _stored(sparse: Tensor) -> int:
    """Numbers that a sparse tensor stores, zeros in the blocks of a blocked one among them."""
    values: Tensor = sparse._values() if sparse.layout == torch.sparse_coo else sparse.values()
    return values.numel()


@_of("addmm", "addmm_", "addmv", "addmv_", "baddbmm", "baddbmm_", "addbmm", "addbmm_", "_sparse_addmm", "sspaddmm")
@_of("_addmm_activation")
def _added_product(_: Tensor, a: Tensor, b: Tensor, *__: Any, **___: Any) -> int | None:
    return _product(a, b)


@_of("sparse_sampled_addmm")
def _sampled(pattern: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """a @ b at the places of the pattern alone."""
    return 2 * _stored(pattern) * a.shape[-1]


@_of("_sparse_mm_reduce_impl")
def _reduced(sparse: Tensor, other: Tensor, *_: Any, **__: Any) -> int:
    return 2 * _stored(sparse) * other.shape[-1]


@_of("_sparse_mm_reduce_impl_backward")
def _reduced_backward(
    sparse: Tensor, grad: Tensor, weight: Tensor, reduce: str, arg: Tensor, mask: list[bool], **__: Any
) -> int:
    return sum(mask) * _reduced(sparse, weight)


@_of("addr", "addr_")
def _added_outer(_: Tensor, a: Tensor, b: Tensor, *__: Any, **___: Any) -> int:
    return 2 * a.numel() * b.numel()


@_of("mul")
def _outer(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """The weight gradient of matrix times vector, which autograd forms as a column times a row; else nothing."""
    if torch._C._current_graph_task_id() < 0 or not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return 0
    column = a.ndim == 2 and a.shape[1] == 1 < a.shape[0]
    row = 1 < b.numel() == b.shape[-1] and b.ndim < 3 if b.ndim else False
    return 2 * a.numel() * b.numel() if column and row else 0


@_of("_trilinear")
def _trilinear(
    a: Tensor, b: Tensor, c: Tensor, expand1: list[int], expand2: list[int], expand3: list[int], *_: Any, **__: Any
) -> int:
    """sum over dimensions of a * b * c, each expanded where it lacks one: the larger of the two products it takes."""
    shapes = []
    for tensor, missing in ((a, expand1), (b, expand2), (c, expand3)):
        own = iter(tensor.shape)
        shapes.append([1 if d in missing else next(own) for d in range(tensor.ndim + len(missing))])
    return 2 * int(prod(map(max, *shapes)))


@_of("_cdist_forward")
def _distances(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Every row of a [..., m, d] against every row of b [..., n, d]: a difference and an addition an element."""
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
    return 2 * int(prod(batch)) * a.shape[-2] * b.shape[-2] * a.shape[-1]


@_of("_cdist_backward")
def _distances_backward(grad: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Of a alone; that of b is another call."""
    return _distances(a, b)


@_of("_pdist_forward")
def _own_distances(a: Tensor, *_: Any, **__: Any) -> int:
    return a.shape[0] * (a.shape[0] - 1) * a.shape[1]


@_of("_pdist_backward")
def _own_distances_backward(grad: Tensor, a: Tensor, *_: Any, **__: Any) -> int:
    return 2 * _own_distances(a)


@_of("convolution_backward")
def _convolution_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    mask: list[bool],
    **_: Any,
) -> int:
    """Each multiply-add of the forward pass has one for the input's gradient and one for the weight's."""
    places = input if transposed else grad
    return sum(mask[:2]) * 2 * places.shape[0] * prod(places.shape[2:]) * weight.numel()


@_of("conv_tbc")
def _convolution_tbc(input: Tensor, weight: Tensor, bias: Tensor, pad: int = 0, **_: Any) -> int:
    """[t, batch, channels] with a kernel [width, channels, out]."""
    places = input.shape[0] + 2 * pad - weight.shape[0] + 1
    return 2 * places * input.shape[1] * weight.numel()


@_of("mkldnn_rnn_layer")
def _rnn_layer(input: Tensor, weight_in: Tensor, weight_hidden: Tensor, *_: Any, **__: Any) -> int:
    """One recurrent layer over [t, n, features]: two products per step with the stacked gate matrices."""
    return 2 * prod(input.shape[:2]) * (weight_in.numel() + weight_hidden.numel())


@_of("mkldnn_rnn_layer_backward")
def _rnn_layer_backward(input: Tensor, weight_in: Tensor, weight_hidden: Tensor, *_: Any, **__: Any) -> int:
    """Each product of the forward pass has two: for its input, where that wants one, and for its weight."""
    unwanted = 0 if input.requires_grad else 2 * prod(input.shape[:2]) * weight_in.numel()
    return 2 * _rnn_layer(input, weight_in, weight_hidden) - unwanted


@_of("_scaled_dot_product_flash_attention_for_cpu")
def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


@_of(
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_cudnn_attention_backward",
)
def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Four products; the scores that a fused kernel forms again are recomputation."""
    return 2 * _attention(query, key, value)


@_of("_flash_attention_backward")
def _packed_flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, *rest: Any, **_: Any
) -> int:
    """As above, of sequences packed into one."""
    return 2 * int(flop_registry[_aten._flash_attention_forward](query, key, value, *rest[:4]))


@_of("_efficient_attention_backward")
def _packed_efficient_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Any, out: Tensor, *rest: Any, **_: Any
) -> int:
    return 2 * int(flop_registry[_aten._efficient_attention_forward](query, key, value, bias, *rest[:4]))
