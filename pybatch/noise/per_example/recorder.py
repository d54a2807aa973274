"""Per-example gradient norms of an ordinary forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pybatch.base.errors import UsageError
from pybatch.noise.per_example.one_pass import Pass
from pybatch.noise.per_example.products import choose
from pybatch.noise.per_example.refusals import refuse_modules
from pybatch.noise.per_example.uses import Route

Reduction = Literal["mean", "sum"]

PROBES = (2, 3)  # examples; two sizes show whether dimension 0 is the batch, and whether the model can be measured


@dataclass
class ExampleNorms:
    """Squared per-example gradient norms of one batch; filled when the `with` block ends.

    Attributes:
        by_parameter: |g_i|^2 of each trainable parameter, float64 [n], by its first name in the model. g_i is the
            gradient of example i's own loss: for a mean over tokens, of the mean over its own tokens.
        mean_sq: |mean gradient|^2 of each parameter, 0-d float64: of the loss as it was, divided by n for a sum.
        weights: what each example counts for in the mean, float64 [n]: ones, or its tokens.
    """

    by_parameter: dict[str, Tensor]
    mean_sq: dict[str, Tensor]
    weights: Tensor

    @property
    def total(self) -> Tensor:
        """|g_i|^2 over all parameters, float64 [n]."""
        return torch.stack(list(self.by_parameter.values())).sum(0)

    @property
    def sq_small(self) -> Tensor:
        """Mean of |g_i|^2 by squared weight, 0-d: the small norm of `estimator.pair`, over `n_small`.

        As examples enter the mean gradient by their weights, their noise enters its squared norm by the squares. So the
        pair is right whether the tokens of an example are independent draws or all alike.
        """
        return (self.total * self.weights**2).sum() / (self.weights**2).sum()

    @property
    def n_small(self) -> Tensor:
        """Examples, or tokens, behind the small norm, 0-d."""
        return (self.weights**2).sum() / self.weights.sum()

    @property
    def sq_large(self) -> Tensor:
        """|mean gradient|^2 over all parameters, 0-d: the large norm of `estimator.pair`."""
        return torch.stack(list(self.mean_sq.values())).sum()

    @property
    def n_large(self) -> Tensor:
        """Examples, or tokens, behind the mean gradient, 0-d."""
        return self.weights.sum()


class ExampleRecorder:
    """Takes the exact per-example gradient norms of a model's backward passes, without forming the gradients.

    Args:
        model: its parameters that require a gradient are measured. Nothing of it is changed.
        backend: "torch", "triton", or None for Triton on GPUs that have it and torch elsewhere.
        route: how products over a sequence are formed (Li et al. 2022; Bu et al. 2022, "Scalable and Efficient Training
            of Large Convolutional Neural Networks with Differential Privacy"); "auto" chooses by shape.

    Raises UsageError for a model with BatchNorm in training, recurrent or fused attention layers, compiled or sharded
    parts. Other operations on parameters are refused in the forward pass, by name. A batch dimension that is not the
    first is noticed by its size: a first batch as large as its sequences are long is refused, because it does not tell
    the two apart; `checked` is True once two batch sizes have been seen, by `probe` or as they come.

        recorder = ExampleRecorder(model)
        with recorder.record(len(x)) as norms:
            loss_fn(model(x), y).backward()
        norms.total  # float64 [len(x)]

    The loss must be a sum or mean of losses of the examples, each independent of the others.
    """

    def __init__(self, model: nn.Module, *, backend: str | None = None, route: Route = "auto") -> None:
        refuse_modules(model)
        self.model, self.route = model, route
        self.products = choose(backend, next(model.parameters()).device)
        self._sizes: set[int] = set()
        self._probing = False
        self._unbatched: dict[str, bool] = {}  # per looked-up parameter: whether its index carries no batch

    @property
    def checked(self) -> bool:
        """Whether two batch sizes have shown that dimension 0 is the batch wherever a parameter is used."""
        return len(self._sizes) > 1

    def probe(self, run: Callable[[int], object], sizes: Sequence[int] = PROBES) -> None:
        """Show that dimension 0 is the batch, and that the model can be measured; gradients are left in `.grad`.

        Args:
            run: makes the forward and backward pass of a batch of so many examples.
            sizes: of the batches, two or more.

        Raises UsageError for a model that can't be measured, with the reason and the remedy.
        """
        self._probing = True
        try:
            for n in sizes:
                with self.record(n):
                    run(n)
        finally:
            self._probing = False

    @contextmanager
    def record(self, n: int, *, reduction: Reduction = "mean", weights: Tensor | None = None) -> Iterator[ExampleNorms]:
        """Measure the one forward and backward pass made inside the block.

        Args:
            n: examples in the batch, along dimension 0 of everything that meets a parameter.
            reduction: of the loss over the examples. With `weights` the mean is weighted by them.
            weights: [n], for a mean over tokens: how many each example has. One without any has norm 0.

        Raises UsageError on leaving the block where no backward pass ran; inside it for whatever can't be measured.
        """
        if reduction not in ("mean", "sum"):
            raise UsageError(f"reduction {reduction!r} is not known. Use 'mean' or 'sum'.")
        if n < 1:
            raise UsageError(f"n {n} holds no example. Give the number of examples in the batch.")
        if weights is not None and (weights.shape != (n,) or reduction != "mean"):
            raise UsageError(
                f"weights of shape {tuple(weights.shape)} with reduction {reduction!r}: give one weight for each of "
                f"the {n} examples, with reduction 'mean'."
            )
        watch = self.watch(n)
        norms = ExampleNorms({}, {}, torch.ones(n, dtype=torch.float64))
        try:
            with watch:
                yield norms
        finally:
            watch.close()
        if not watch.squares:
            raise UsageError(
                "per-example norms: no gradient arrived inside the block. Run forward and backward pass in it."
            )
        fill(norms, watch, n, reduction, weights)
        self.seen(n)

    def watch(self, n: int, kind: type[Pass] = Pass) -> Pass:
        """The watch over one pass of n examples, to be entered for its forward and closed after its backward pass."""
        settled = bool(self._sizes - {n}) or n == 1
        return kind(self.model, n, self.products, self.route, self._unbatched, settled, self._probing)

    def seen(self, n: int) -> None:
        """A pass of n examples was measured."""
        self._sizes.add(n)


def fill(
    norms: ExampleNorms, watch: Pass, n: int, reduction: Reduction = "mean", weights: Tensor | None = None
) -> None:
    """What a pass found, once it is closed."""
    device = next(iter(watch.squares.values())).device
    share = torch.ones(n, dtype=torch.float64, device=device) if weights is None else weights.to(device).double()
    factor = torch.where(share > 0, share.sum() / share, 0.0) if reduction == "mean" else share
    # Stacked, so that as many operations serve all parameters as one: of those without a part in this loss zeros.
    zero, divisor = share.new_zeros(n), n**2 if reduction == "sum" else 1
    squares = torch.stack([watch.squares.get(name, zero).to(device) for name in watch.names]) * factor.square()
    means = torch.stack([watch.means.get(name, zero[0]).to(device) for name in watch.names]) / divisor
    norms.by_parameter = dict(zip(watch.names, squares.unbind(), strict=True))
    norms.mean_sq = dict(zip(watch.names, means.unbind(), strict=True))
    norms.weights = share
