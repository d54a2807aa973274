"""Whether another backend did to a list of tensors what the C++ core did."""

import torch

from pybatch import _C, ops


def unit(storage):
    """What two neighbours of the storage are apart by, relative."""
    return torch.finfo(getattr(torch, storage.split("_")[0])).eps if storage else 0.0


def assert_same(own, twin, storage=None):
    """Equal but for fp32 arithmetic in another order, which can move a 16-bit value to its neighbour."""
    for i, (a, b) in enumerate(zip(own.params, twin.params, strict=True)):
        torch.testing.assert_close(b, a, rtol=2e-5 + unit(storage), atol=1e-5, msg=lambda m, i=i: f"parameter {i}: {m}")
        if a.dtype != torch.float32:
            assert (a != b).double().sum() <= 2 + 0.002 * a.numel()
    for a, b in zip(own.values(), twin.values(), strict=True):
        torch.testing.assert_close(b, a, rtol=2e-5 + unit(storage), atol=1e-5)
    states = [[s for of in setup.states for s in of] for setup in (own, twin)]
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-5 + unit(storage), atol=1e-5 + unit(storage))
    assert torch.equal(own.list.steps, twin.list.steps)
    assert int(twin.list.ticket) == 0  # else the next launch, or a graph's replay, never finds its last block
    assert_told(own, twin)
    if own.layers is not None:
        torch.testing.assert_close(twin.layers, own.layers, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(twin.ledger.ring, own.ledger.ring, rtol=1e-4, atol=1e-2)


def assert_told(own, twin):
    """Each step's ledger and norms, which a later one may hide: to the last bit where no sum of squares was rounded."""
    kind = ops.RULES[own.rule].norms
    for a, b in zip(own.told, twin.told, strict=True):
        exact = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}
        rounded = {"rtol": 1e-6, "atol": 1e-6, "equal_nan": True}
        torch.testing.assert_close(b.ledger, a.ledger, **(exact if a.whole_gradients else rounded))
        # CUDA leaves norms alone that no rule needs, and those of a rule's direction where the step is left out.
        if kind == "none" or (kind == "direction" and float(a.ledger[_C.ledger["skip"]])):
            continue
        for name, whole in (("param_sq", a.whole_params), ("direction_sq", a.whole_gradients and kind == "gradient")):
            column = _C.row_norms[name]
            how = exact if whole else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(b.norms[:, column], a.norms[:, column], **how)


def assert_same_but_for_codes(own, twin):
    """For narrow states: equal but for a few values that another order of arithmetic moves to the next code."""
    for a, b in zip(own.values(), twin.values(), strict=True):
        off = (a - b).abs() > 1e-4 + 2e-4 * a.abs()
        assert off.sum() <= 2 + 0.002 * a.numel()
        torch.testing.assert_close(b, a, rtol=0.05, atol=0.02)
    for a, b in zip(own.wide_states(), twin.wide_states(), strict=True):
        off = (a - b).abs() > 1e-5 + 1e-4 * a.abs()
        assert off.sum() <= 2 + 0.002 * a.numel()
        largest = a.abs().max() if a.numel() else 0.0
        assert ((a - b).abs() <= 0.01 * a.abs() + 0.015 * largest).all()
    assert torch.equal(own.list.steps, twin.list.steps)
    assert torch.equal(own.list.scalars, twin.list.scalars)
    assert int(twin.list.ticket) == 0
    assert_told(own, twin)
