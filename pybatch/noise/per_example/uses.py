"""What one use of a parameter adds to each example's gradient, and the squared norm of the sum over all uses.

A weight of shape [R, C] gets sum_t rows_t (x) cols_t per example from a linear layer (Goodfellow 2015, "Efficient
Per-Example Gradient Computations"; with a sequence axis Li et al. 2022, "Large Language Models Can Be Strong
Differentially Private Learners"), and an embedding is the case of one-hot rows. Several uses of one weight are one
longer sum over t, so cross terms need no code of their own but between the two kinds. Products are fp32 (fp64 for fp64
models), sums of squares fp64 across blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pybatch.base.errors import UsageError
from pybatch.noise.norms import ROW

Route = Literal["auto", "single", "gram", "weight", "fused"]

FUSED_COST = 40  # Gram products an element of the weight; at 20 to 32 Gram was faster on a CPU, at 160 and up slower
GRAM_BLOCK = 32  # positions, a multiple of which a block must have to be formed at the full rate
CACHE_BYTES = 1 << 20  # of products that are read again at once: about a core's own cache
CHUNK_BYTES = 64 << 20  # of intermediate results at a time; examples are processed in chunks that keep to it


@dataclass(frozen=True)
class Outer:
    """sum_t rows[n, g, t] (x) cols[n, g, t]: linear layers (g = 1) and convolutions over unfolded input.

    Attributes:
        grad: gradient of the output, [n, ...].
        input: [n, ...].
        unfold: some examples of both -> rows [m, groups, t, R] and cols [m, groups, t, C].
        sizes: groups, t, R, C.
        norm: |sum|^2 of this use alone, where its weight gradient was formed with it.
    """

    grad: Tensor
    input: Tensor
    unfold: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    sizes: tuple[int, int, int, int]
    norm: Tensor | None = None

    def part(self, part: slice) -> tuple[Tensor, Tensor]:
        """Rows and columns of some of the examples."""
        return self.unfold(self.grad[part], self.input[part])


@dataclass(frozen=True)
class Picked:
    """sum_t onehot(index[n, t]) (x) values[n, t]: embeddings."""

    index: Tensor  # [n, t], int64
    values: Tensor  # [n, t, C], zero where the index is padding


@dataclass(frozen=True)
class Dense:
    """The per-example gradient itself, of a parameter no larger than an activation: biases, norms, position tables."""

    values: Tensor  # [n, *shape of the part of the parameter used]
    elements: Callable[[], Tensor] | None = None  # flat element numbers of that part; None: the whole parameter

    @property
    def short(self) -> bool:
        """Whether it is cheap to keep until the pass is over, as of a bias or a norm layer."""
        return self.elements is None and self.values[0].numel() <= ROW


Use = Outer | Picked | Dense

# (grad, input, weight or None, eps, whether the mean is taken off) -> gradient of the input, and per example those of
# weight and bias, fp32 [n, width].
NormBackward = Callable[[Tensor, Tensor, Tensor | None, float, bool], tuple[Tensor, Tensor, Tensor]]


class Products:
    """The products behind the norms, in torch. rows is [n, g, t, R], cols [n, g, t, C]; results are float64 [n]."""

    stored = True  # whether gram and weight write out the products they sum over

    def single(self, rows: Tensor, cols: Tensor) -> Tensor:
        """|rows|^2 |cols|^2 summed over groups, where t = 1."""
        return (_squares(wide(rows)) * _squares(wide(cols))).sum((1, 2))

    def gram(self, rows: Tensor, cols: Tensor) -> Tensor:
        """sum_tt' (rows_t . rows_t')(cols_t . cols_t')."""
        found = _gram(wide(rows).flatten(0, 1), wide(cols).flatten(0, 1))
        return found.view(len(rows), -1).sum(1)

    def weight(self, rows: Tensor, cols: Tensor) -> Tensor:
        """|sum_t rows_t (x) cols_t|^2 by the products themselves."""
        return _squares((wide(rows).mT @ wide(cols)).flatten(1))

    def fuses(self, t: int, r: int, c: int) -> bool:
        """Whether forming a linear layer's weight gradient together with the norms is the cheapest way to them."""
        return t > 1 and t * t * (r + c) > FUSED_COST * r * c

    def fused(self, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
        """rows [n, t, R], cols [n, t, C]: norms as of `weight`, and the sum over examples [R, C], fp32 or fp64."""
        rows, cols = wide(rows), wide(cols)
        total = rows.new_zeros(rows.shape[2], cols.shape[2])
        found = []
        step = max(1, CACHE_BYTES // (total.numel() * total.element_size()))
        for start in range(0, len(rows), step):
            product = rows[start : start + step].mT @ cols[start : start + step]
            found.append(_squares(product.flatten(1)))
            total += product.sum(0) if len(product) > 1 else product[0]
        return torch.cat(found), total

    def norm_backward(self, input: Tensor, normalized_shape: Sequence[int]) -> NormBackward | None:
        """The one-pass backward of LayerNorm and RMSNorm on such an input, where there is one."""
        return None

    def picked(self, index: Tensor, values: Tensor) -> Tensor:
        """|sum_t onehot(index_t) (x) values_t|^2 over [n, t] and [n, t, C]; a repeated token adds up first."""
        n, t = index.shape
        ordered, order = index.sort(dim=1)
        fresh = torch.ones_like(ordered)
        fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        # Numbers the distinct tokens of each example in sorted order: no data-dependent shape, no wait.
        slot = fresh.cumsum(1) - 1 + t * torch.arange(n, device=index.device)[:, None]
        sums = values.new_zeros(n * t, values.shape[2])
        sums.index_add_(0, slot.flatten(), values.gather(1, order[..., None].expand_as(values)).flatten(0, 1))
        return _squares(sums.view(n, -1))


def _gram(rows: Tensor, cols: Tensor) -> Tensor:
    """sum_tt' (rows_t . rows_t')(cols_t . cols_t') over [m, t, R] and [m, t, C]: float64 [m].

    Both matrices are symmetric: of the two quarters off the diagonal one is formed and counted twice.
    """
    m, t, _ = rows.shape
    if t % (2 * GRAM_BLOCK) or not (rows.is_contiguous() and cols.is_contiguous()):
        return _inner(rows, rows, cols, cols)
    half = t // 2
    own_rows, own_cols = rows.view(2 * m, half, -1), cols.view(2 * m, half, -1)
    own = _inner(own_rows, own_rows, own_cols, own_cols).view(m, 2).sum(1)
    return own + 2 * _inner(rows[:, :half], rows[:, half:], cols[:, :half], cols[:, half:])


def _inner(rows: Tensor, rows2: Tensor, cols: Tensor, cols2: Tensor) -> Tensor:
    product = torch.bmm(rows, rows2.mT).mul_(torch.bmm(cols, cols2.mT))
    return product.sum(-1).sum(1, dtype=torch.float64)


TORCH = Products()


def squared_norms(
    uses: Sequence[Use], shape: torch.Size, name: str, products: Products = TORCH, route: Route = "auto"
) -> Tensor:
    """|sum of all uses|^2 per example, float64 [n].

    Args:
        uses: everything one backward pass added to one parameter.
        shape: of the parameter.
        name: of the parameter, for the error.

    Raises UsageError for uses of kinds whose cross terms are not computed.
    """
    dense = [use for use in uses if isinstance(use, Dense)]
    outer = [use for use in uses if isinstance(use, Outer)]
    picked = [use for use in uses if isinstance(use, Picked)]
    if dense and len(dense) < len(uses):
        raise UsageError(
            f"parameter {name!r} is used both in a matrix product or lookup and element by element: the cross terms of "
            "its per-example gradient are not computed. Freeze it, or use source='micro-batches'."
        )
    if dense:
        return _squares(_dense_sum(dense, shape).flatten(1))
    norms = []
    if outer:
        norms.append(_outer(outer, products, route))
    if picked:
        index = torch.cat([use.index for use in picked], 1)
        values = torch.cat([use.values for use in picked], 1)
        norms.append(products.picked(index, values))
        if outer:
            norms.append(2 * _cross(outer, index, values))
    return torch.stack(norms).sum(0)


def dense_norms(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Squared norms, float64 [n], of formed per-example gradients [n, ...] by name: one launch for all of one size."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, own in values.items():
        alike.setdefault((own.dtype, own.device, own[0].numel()), []).append(name)
    found: dict[str, Tensor] = {}
    for names in alike.values():
        found |= dict(zip(names, _squares(torch.stack([values[name].flatten(1) for name in names])), strict=True))
    return found


def _outer(uses: Sequence[Outer], products: Products, route: Route) -> Tensor:
    if len(uses) == 1 and uses[0].norm is not None:
        return uses[0].norm
    groups, _, r, c = uses[0].sizes
    t = sum(use.sizes[1] for use in uses)
    if route in ("auto", "fused"):
        route = "single" if t == 1 else "gram" if t * t < r * c else "weight"
    method = {"single": products.single, "gram": products.gram, "weight": products.weight}[route]
    elements = groups * t * (r + c)
    if products.stored:
        elements += groups * {"single": 0, "gram": 2 * t * t, "weight": r * c}[route]
    return torch.cat([method(*_joined(uses, part)) for part in _chunks(uses[0].grad, elements)])


def _joined(uses: Sequence[Outer], part: slice) -> tuple[Tensor, Tensor]:
    """All uses as one longer sum: cross terms between uses of one weight come with it."""
    parts = [use.part(part) for use in uses]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([rows for rows, _ in parts], 2), torch.cat([cols for _, cols in parts], 2)


def _cross(uses: Sequence[Outer], index: Tensor, values: Tensor) -> Tensor:
    """<sum_t rows_t (x) cols_t, sum_s onehot(index_s) (x) values_s> = sum_ts rows[t, index_s] (cols_t . values_s)."""
    _, _, r, c = uses[0].sizes
    t, s = sum(use.sizes[1] for use in uses), index.shape[1]
    found = []
    for part in _chunks(values, t * (r + c) + 2 * t * s):
        rows, cols = (wide(x[:, 0]) for x in _joined(uses, part))  # an embedding's weight has no groups
        product = rows.gather(2, index[part][:, None].expand(-1, t, -1)).mul_(cols @ values[part].mT)
        found.append(product.sum(-1).sum(1, dtype=torch.float64))
    return torch.cat(found)


def _dense_sum(uses: Sequence[Dense], shape: torch.Size) -> Tensor:
    if len(uses) == 1 and uses[0].elements is None:
        return uses[0].values
    n = len(uses[0].values)
    total = uses[0].values.new_zeros(n, shape.numel())
    for use in uses:
        if use.elements is None:
            total += use.values.reshape(n, -1)
        else:
            total.index_add_(1, use.elements().flatten(), use.values.flatten(1))
    return total


def _squares(x: Tensor) -> Tensor:
    """Sum of squares over the last dimension as float64: fp32 within blocks, float64 across them."""
    whole = x.shape[-1] - x.shape[-1] % ROW
    total: Tensor = torch.linalg.vector_norm(x[..., whole:], dim=-1).double().square()
    if whole:
        blocks = x[..., :whole].reshape(*x.shape[:-1], -1, ROW)
        total = total + torch.linalg.vector_norm(blocks, dim=-1).double().square().sum(-1)
    return total


def wide(x: Tensor) -> Tensor:
    """In fp32, or in fp64 where it already is."""
    return x if x.dtype == torch.float64 else x.float()


def _chunks(like: Tensor, elements: int) -> Iterator[slice]:
    """Slices of the examples of `like`, each with about CHUNK_BYTES of so many fp32 elements an example."""
    step = max(1, CHUNK_BYTES // (4 * max(elements, 1)))
    for start in range(0, len(like), step):
        yield slice(start, start + step)
