"""How the CPU core keeps parameters: every rule in every storage is the fp32 rule, rounded as the storage says."""

import numpy as np
import pytest
import torch
from cases import lists
from cases.problem import same_bits

from pybatch import _C, ops

pytestmark = pytest.mark.isa

CHUNK = ops.CppBackend.chunk
every_rule = pytest.mark.parametrize("rule", lists.RULES)
halves = pytest.mark.parametrize("name", [name for name in ("bfloat16", "float16") if name in ops.STORAGES])
UNCHANGED = {"weight_decay": 0.0, "adjustment": 1.0}  # of MuonMove: a step of the rate times the gradient
SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 3.4028235e38, -3.4028235e38, 1e-45, -1e-40, 65504.0, 65519.9]


@pytest.fixture(autouse=True, params=_C.cpu_widths())
def width(request):
    chosen = _C.cpu_width()
    _C.set_cpu_width(request.param)
    yield
    _C.set_cpu_width(chosen)


def setups(rule, storage, steps=3, grad_dtype=None):
    """A list kept as `storage`, and an fp32 one with the same values, gradients and states."""
    dtype = getattr(torch, storage.split("_")[0])
    start = lists.draw(lists.sizes(), dtype, seed=5)
    kept, plain = lists.Setup([p.clone() for p in start], rule, storage), lists.Setup([p.float() for p in start], rule)
    grads = [lists.draw(lists.sizes(), grad_dtype or dtype, seed=i + 1) for i in range(steps)]
    return kept, plain, grads


def in_fp32(values):
    return [v.float() for v in values]


def all_states(setup):
    return [s for of in setup.states for s in of]


@every_rule
@halves
def test_plain_16_bits_are_the_fp32_result_rounded(rule, name):
    kept, plain, steps = setups(rule, name)
    for grads in steps:
        kept.step(grads, norm=True)
        plain.step(in_fp32(grads), norm=True)
        assert same_bits(kept.params, [p.to(q.dtype) for p, q in zip(plain.params, kept.params, strict=True)])
        assert same_bits(all_states(kept), all_states(plain))
        for p, q in zip(plain.params, kept.params, strict=True):
            p.copy_(q)  # what is kept is what the next step starts from
        plain.list.forget()


@every_rule
@halves
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_a_master_is_the_fp32_parameter(rule, name, grad_dtype):
    kept, plain, steps = setups(rule, f"{name}_master", grad_dtype=grad_dtype)
    for grads in steps:
        kept.step(grads, norm=True)
        plain.step(in_fp32(grads), norm=True)
    assert same_bits(kept.masters, plain.params)
    assert same_bits(kept.params, [p.to(q.dtype) for p, q in zip(plain.params, kept.params, strict=True)])
    assert same_bits(all_states(kept), all_states(plain))


@every_rule
def test_a_remainder_is_the_fp32_parameter(rule):
    kept, plain, steps = setups(rule, "bfloat16_remainder")
    for grads in steps:
        kept.step(grads, norm=True)
        plain.step(in_fp32(grads), norm=True)
    assert same_bits(kept.values(), plain.params)
    assert same_bits(all_states(kept), all_states(plain))
    for p, q in zip(plain.params, kept.params, strict=True):
        tie = (p.view(torch.int32) & 0xFFFF) == 0x8000  # goes away from zero here, to even in torch
        assert torch.equal(q[~tie], p.to(torch.bfloat16)[~tie])


class Passage:
    """Puts fp32 values through a storage: one step of MuonMove with rate -1 from -0, which gives them as they are."""

    def __init__(self, storage, counts, seed=7):
        params = [torch.zeros(n, dtype=getattr(torch, storage.split("_")[0])) for n in counts]
        self.setup = lists.Setup(params, "MuonMove", storage, seed)
        self.setup.set_hyper(-1.0, **UNCHANGED)

    def step(self, values):
        for param, master in zip(self.setup.params, self.setup.masters, strict=True):
            param.fill_(-0.0)
            if master is not None:
                master.zero_()
        self.setup.step(values)


def patterns():
    """Special values, and patterns of the low half beside some high halves: small, large, NaN of many kinds."""
    high = np.array([0x0000, 0x0080, 0x3F7F, 0x3F80, 0x7F7F, 0x7F80, 0x7FFF, 0xBF80, 0xFF7F], dtype=np.uint32)
    bits = (high[:, None] << 16 | np.arange(0, 0x10000, 7, dtype=np.uint32)).ravel()
    return np.concatenate([np.array(SPECIAL, np.float32), bits.view(np.float32)])


def test_remainder_keeps_every_value():
    target = torch.from_numpy(patterns())
    passage = Passage("bfloat16_remainder", [len(target)])
    passage.step([target])
    got, param = passage.setup.values()[0], passage.setup.params[0].float()
    nan = target.isnan()
    assert torch.equal(got[~nan].view(torch.int32), target[~nan].view(torch.int32))
    assert got[nan].isnan().all()
    assert param[nan].isnan().all()
    assert param[target.isinf()].isinf().all()
    assert (target - param)[target.abs() < 3e38].abs().max() <= 2.0**119  # half the spacing below 2^128


def fmix32(h):
    """MurmurHash3's finalizer on uint32 arrays."""
    with np.errstate(over="ignore"):
        h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def random_bits(seed, salt, step, count, begin=0):
    """What kernels/storage.h documents, in NumPy: of elements [begin, begin + count)."""

    def mix(key, word):
        with np.errstate(over="ignore"):
            return fmix32((key ^ np.asarray(word, dtype=np.uint32)) + np.uint32(0x9E3779B9))

    key = np.uint32(0)
    for word in (seed & 0xFFFFFFFF, seed >> 32, salt, step, begin >> 32):
        key = mix(key, word)
    return mix(key, (begin + np.arange(count)) & 0xFFFFFFFF)


def test_the_hash_is_the_published_one():
    assert fmix32(np.array([1], dtype=np.uint32))[0] == 0x514E28B7


def rounded(values, random, name):
    """fp32 values stochastically rounded, by fractions in float64 where the core works on bits."""
    if name == "bfloat16":
        bits = values.view(np.uint32)
        result = ((bits + (random & np.uint32(0xFFFF))) & np.uint32(0xFFFF0000)).view(np.float32)
        return np.where(np.isfinite(values), result, values)
    exact = np.abs(np.where(np.isfinite(values), values, 0.0).astype(np.float64))
    spacing = 2.0 ** np.maximum(np.floor(np.log2(np.maximum(exact, 1e-300))) - 10, -24)
    count = np.floor(exact / spacing)
    share = exact / spacing - count
    fine = np.where(exact < 2.0**-14, np.floor(share * 65536) / 65536, share)
    draw = np.where(exact < 2.0**-14, (random & 0xFFFF) / 65536, (random & 0x1FFF) / 8192)
    with np.errstate(over="ignore"):
        result = ((count + (fine + draw >= 1)) * spacing).astype(np.float16)
        return np.where(np.isfinite(values), np.copysign(result, values), values)


@halves
@pytest.mark.parametrize("seed", [0, 7, 2**63 + 5])
def test_stochastic_rounding_is_what_it_says(name, seed):
    rng = np.random.default_rng(0)
    drawn = np.concatenate([rng.standard_normal(CHUNK + 77), rng.standard_normal(4000) * 2.0**-20])
    values = np.concatenate([patterns(), drawn.astype(np.float32)])
    passage = Passage(f"{name}_stochastic", [3, len(values)], seed)
    for step in (1, 2):
        passage.step([torch.zeros(3), torch.from_numpy(values)])
        got = passage.setup.params[1].float().numpy()
        wanted = rounded(values, random_bits(seed, 1, step, len(values)), name).astype(np.float32)
        np.testing.assert_array_equal(got, wanted)
        np.testing.assert_array_equal(np.signbit(got), np.signbit(wanted))
    assert np.isnan(got[np.isnan(values)]).all()


@halves
def test_stochastic_rounding_has_no_bias_where_rounding_to_nearest_loses_everything(name):
    count, steps = 1 << 15, 20
    eps = torch.finfo(getattr(torch, name)).eps
    move = eps / 32  # a 16th of the spacing below 1: to nearest, 1 stays 1
    grads = [torch.ones(count)]
    means = {}
    for storage in (name, f"{name}_stochastic"):
        setup = lists.Setup([torch.ones(count, dtype=getattr(torch, name))], "MuonMove", storage)
        setup.set_hyper(move, **UNCHANGED)
        for _ in range(steps):
            setup.step(grads)
        means[storage] = float(setup.params[0].double().mean())
    assert means[name] == 1.0
    spread = (eps / 2) * (steps * (1 / 16) * (15 / 16) / count) ** 0.5
    assert abs(means[f"{name}_stochastic"] - (1 - steps * move)) < 4 * spread


@halves
def test_random_bits_depend_on_seed_tensor_and_step_and_on_nothing_else(name):
    def result(seed, steps=1, threads=1, position=0):
        params = [torch.ones(CHUNK * 3 + 5, dtype=getattr(torch, name)) for _ in range(2)]
        setup = lists.Setup(params, "MuonMove", f"{name}_stochastic", seed)
        setup.set_hyper(torch.finfo(params[0].dtype).eps / 4, **UNCHANGED)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        for _ in range(steps):
            for p in params:
                p.fill_(1.0)
            setup.step([torch.ones(len(p)) for p in params])
        torch.set_num_threads(before)
        return params[position] != 1.0

    base = result(3)
    assert torch.equal(base, result(3, threads=3))
    assert 0.47 < base.double().mean() < 0.53
    for other in (result(4), result(3 + 2**40), result(3, steps=2), result(3, position=1)):
        agreement = (base == other).double().mean()  # of independent halves: 0.5, +- 0.0023
        assert 0.49 < agreement < 0.51


@pytest.mark.parametrize("begin", [2**31, 2**32 + 3 * CHUNK])
def test_random_bits_past_two_to_the_32_elements(begin):
    values = np.random.default_rng(0).standard_normal(CHUNK).astype(np.float32)
    passage = Passage("bfloat16_stochastic", [CHUNK])
    tensors = passage.setup.list
    # The only chunk is far out: its address is of a tensor that would begin `begin` elements earlier.
    tensors.rows[0, _C.columns["numel"]] = begin + CHUNK
    tensors.rows[0, _C.columns["param"]] -= 2 * begin
    tensors.chunks[0, 1] = begin // CHUNK
    target = torch.from_numpy(values)
    call = passage.setup.call([target])
    tensors.rows[0, _C.columns["grad"]] -= 4 * begin
    passage.setup.backend.step(tensors, call)
    wanted = rounded(values, random_bits(7, 0, 1, CHUNK, begin), "bfloat16")
    np.testing.assert_array_equal(passage.setup.params[0].float().numpy(), wanted)
