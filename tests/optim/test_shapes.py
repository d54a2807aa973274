"""Random lists of tensors: any shapes, layouts and dtypes together follow the float64 reference."""

import numpy as np
import torch
from cases import problem
from cases.catalogue import EXACT
from hypothesis import given, settings
from hypothesis import strategies as st

shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
layouts = st.sampled_from(["contiguous", "transposed", "gaps", "misaligned", "reversed dimensions"])
tensors = st.tuples(shapes, layouts, st.sampled_from(problem.DTYPES))
cases = st.sampled_from([(case, options) for case in EXACT for options in case.VARIANTS])


def build(shape, layout, dtype, generator):
    """A parameter of this shape whose memory is laid out as named, where the shape allows it."""
    x = torch.randn(shape, generator=generator).to(dtype)
    if layout == "misaligned":
        x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(shape)
    elif layout == "gaps" and x.dim():
        x = torch.stack([x, x], -1)[..., 0]
    elif layout == "transposed" and x.dim() > 1:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "reversed dimensions":
        order = tuple(range(x.dim()))[::-1]
        x = x.permute(order).contiguous().permute(order)
    return torch.nn.Parameter(x)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    case=cases,
    rows=st.lists(tensors, min_size=1, max_size=6),
    beyond=st.sampled_from([None, -1, 0, 1]),  # elements past the end of a chunk, where there is a tensor of that size
    master=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_list_follows_the_reference(case, rows, beyond, master, seed):
    case, options = case
    generator = torch.Generator().manual_seed(seed)
    params = [build(*row, generator) for row in rows]
    if beyond is not None:
        params.append(torch.nn.Parameter(torch.randn(16384 + beyond, generator=generator)))
    opt = case.optimizer(params, lr=case.LR, master_weights=master, **options)
    start = [problem.double(p) for p in params]
    wanted, states = [s.copy() for s in start], [{} for _ in params]
    for _ in range(2):
        problem.give_gradients(params, generator)
        for i, p in enumerate(params):
            new = case.reference(wanted[i], problem.double(p.grad), states[i], case.LR, **options)
            wanted[i] = new if master else problem.rounded(new, p.dtype)
        opt.step()
    for p, w, s in zip(params, wanted, start, strict=True):
        allowed = 1e-5 * np.abs(w - s).max(initial=0.0) + 8 * torch.finfo(p.dtype).eps
        assert np.abs(problem.double(p) - w).max(initial=0.0) <= allowed
