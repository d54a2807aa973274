"""What makes a measured noise scale mean something else than the spread of per-example gradients."""

from __future__ import annotations

from torch import nn

from pybatch.records import NoiseScale, Note

FINITE_SHARE = 0.1  # of the data set, from which on drawing with or without replacement makes a difference


def confounds(model: nn.Module, examples: int | None, found: NoiseScale, training: bool = True) -> list[Note]:
    """What in the model or the data makes B_simple mean something else than the spread of per-example gradients."""
    notes = []
    modules = list(model.modules())
    if training and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules):
        size = "this size" if found.small_batch is None else f"{found.small_batch:g}"
        text = (
            "the model has BatchNorm: an example's gradient then depends on its micro-batch, so the scale holds for "
            f"micro-batches of {size}"
        )
        notes.append(Note("noise.b_simple", text))
    if training and any(_drops(m) for m in modules):
        notes.append(Note("noise.b_simple", "dropout was active, as in training: its noise is part of the scale"))
    scale = found.b_simple if found.b_simple is not None else found.low
    if examples is not None and scale is not None and scale > FINITE_SHARE * examples:
        text = (
            f"a good part of the {examples} examples of the data set: shuffled epochs have less noise than independent "
            f"draws, 1/B - 1/{examples} in place of 1/B"
        )
        notes.append(Note("noise.b_simple", text))
    return notes


def _drops(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    share = getattr(module, "dropout", 0.0)  # recurrent and attention modules keep it as a number
    return isinstance(share, int | float) and share > 0
