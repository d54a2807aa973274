"""A list of awkward tensors, a stream of gradients for it, and the check against a float64 reference."""

import numpy as np
import torch

from pybatch import ops

DTYPES = tuple(ops.DTYPES)  # without float16 where the compiler has none


def tensors(dtype=torch.float32, device="cpu", seed=0, small=False, backend="cpp"):
    """Parameters as a user may have them: empty, 0-d, around a chunk's end, strided, misaligned, permuted.

    The chunk is the backend's own; `small` takes 64 elements, where only the shapes matter.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    chunk = 64 if small else ops.BACKENDS[backend].chunk
    made = [draw(5, 3), draw(), draw(0), draw(chunk - 1), draw(chunk), draw(chunk + 1), draw(1)]
    made.append(draw(6, 4)[:, ::2])  # memory with gaps
    made.append(draw(37)[1:])  # not aligned to a vector
    made.append(draw(2, 3, 4, 5).to(memory_format=torch.channels_last))
    made.append(draw(7, 9).t())
    made.append(draw(2 * chunk + 1))
    return [torch.nn.Parameter(tensor) for tensor in made]


def give_gradients(params, generator, scale=1.0):
    """Fresh gradients, as after zero_grad(set_to_none=True); every other one in a layout of its own."""
    for i, p in enumerate(params):
        g = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype).to(p.device)
        if i % 2 and g.dim() > 1:
            g = g.transpose(0, 1).contiguous().transpose(0, 1)
        p.grad = g


def double(tensor):
    """A tensor as a float64 array."""
    return tensor.detach().cpu().to(torch.float64).numpy().copy()


def global_norm(grads):
    return np.sqrt(sum((g**2).sum() for g in grads))


def follow(params, options, update, lr, steps=6, clip=None, seed=1, optimizer=None, stored=None):
    """Run `steps` of the optimizer and of `update` (float64) on the same gradients.

    Returns `compare` of the two.
    The reference is `stored` in the dtype after every step, as parameters are.
    """
    start = [double(p) for p in params]
    wanted, states = [s.copy() for s in start], [{} for _ in params]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        give_gradients(params, generator)
        grads = [double(p.grad) for p in params]
        norm = global_norm(grads)
        factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        for i, g in enumerate(grads):
            new = update(wanted[i], g * factor, states[i], lr, **options)
            wanted[i] = (stored or rounded)(new, params[i].dtype)
        if optimizer is not None:
            optimizer.step()
            if clip:
                np.testing.assert_allclose(float(optimizer.grad_norm), norm, rtol=1e-6)
    return compare(params, wanted, start)


def rounded(value, dtype):
    """What is read back after storing a float64 array as `dtype`."""
    return double(torch.from_numpy(np.asarray(value)).to(dtype))


def truncated(value, dtype):
    """As `rounded`, but bf16 keeps only the upper half of an fp32: so does Triton's interpreter; a GPU rounds."""
    if dtype != torch.bfloat16:
        return rounded(value, dtype)
    bits = np.asarray(value, dtype=np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)


def compare(params, wanted, start):
    """(error, movement, share): largest deviation, largest distance moved, and sum of deviations over sum of moves."""
    deviation = [np.abs(double(p) - w) for p, w in zip(params, wanted, strict=True)]
    moves = [np.abs(w - s) for w, s in zip(wanted, start, strict=True)]
    share = sum(d.sum() for d in deviation) / sum(m.sum() for m in moves)
    return max(d.max(initial=0.0) for d in deviation), max(m.max(initial=0.0) for m in moves), share


def assert_follows(result, dtype):
    """The error is judged against the movement. Beyond it only storage may deviate: where the reference lies between
    two values of the dtype, an element can be stored one unit in the last place off, twice where it then moves on."""
    error, movement, share = result
    unit = 4 * torch.finfo(dtype).eps  # parameters stay below 8
    assert movement > (100 * unit if dtype == torch.float32 else unit)
    assert error <= 1e-5 * movement + 2 * unit
    assert share < {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.005}[dtype]


def train(opt, params, steps, seed=3):
    """Steps on random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        give_gradients(params, generator)
        opt.step()
        opt.zero_grad()


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(params, others, rtol=2e-5):
    """Raise AssertionError where two lists of parameters are apart by more than fp32 arithmetic in another order."""
    for p, q in zip(params, others, strict=True):
        np.testing.assert_allclose(double(p), double(q), rtol=rtol, atol=rtol)
