"""Every rule of the CPU core on plain tensors: against float64, over chunks, phases, threads and verdicts."""

import math
import threading

import numpy as np
import pytest
import torch
from cases import lars, lists
from cases.problem import compare, double, same_bits

from pybatch import _C, ops

CHUNK = ops.CppBackend.chunk
rules = pytest.mark.parametrize("rule", lists.RULES)
with_norms = pytest.mark.parametrize("rule", [name for name, of in ops.RULES.items() if of.norms != "none"])


@pytest.fixture
def width():
    chosen = _C.cpu_width()
    yield _C.set_cpu_width
    _C.set_cpu_width(chosen)


def gradients(setup, steps=3, seed=1):
    return [lists.draw([len(p) for p in setup.params], seed=seed + i) for i in range(steps)]


def run(setup, steps=3, **scalars):
    """The setup after some steps on random gradients."""
    for grads in gradients(setup, steps):
        setup.step(grads, **scalars)
    return setup


def make(rule, counts=None, **more):
    return lists.Setup(lists.draw(counts or lists.sizes(), seed=5), rule, **more)


def test_no_rule_is_left_out():
    assert set(lists.RULES) == set(ops.RULES)


@rules
@pytest.mark.isa
@pytest.mark.parametrize("width_name", _C.cpu_widths())
def test_follows_the_float64_reference(rule, width_name, width):
    width(width_name)
    setup = make(rule)
    start = [double(p) for p in setup.params]
    wanted = lists.follow(setup, gradients(setup), lists.RULES[rule].reference)
    error, movement, share = compare(run(setup).params, wanted, start)
    assert movement > 0.05
    assert error <= 1e-5 * movement
    assert share < 1e-6


def test_a_wrong_reference_is_caught():
    setup = make("Lars")
    start = [double(p) for p in setup.params]
    wanted = lists.follow(setup, gradients(setup), lars.without_ratio)
    assert compare(run(setup).params, wanted, start)[2] > 0.01


@rules
def test_clipping_unscaling_and_maximize(rule):
    setup = make(rule, maximize=True)
    steps = gradients(setup)
    norm = math.sqrt(sum((g.double() ** 2).sum() for g in steps[0])) / 8
    start = [double(p) for p in setup.params]
    wanted = lists.follow(setup, steps[:1], lists.RULES[rule].reference, scale=-0.5 / (norm + 1e-6) / 8)
    scale = torch.tensor(4.0)
    setup.step(steps[0], norm=True, clip=True, max_norm=0.5, inverse=0.5, grad_scale=scale.data_ptr())
    assert float(setup.ledger["norm"]) == pytest.approx(norm, rel=1e-12)
    assert compare(setup.params, wanted, start)[2] < 1e-5


@rules
def test_gradients_are_left_unscaled(rule):
    for dtype in ops.DTYPES:
        lists.unscale(make(rule), dtype)


@rules
def test_a_tensor_without_gradient_stays(rule):
    setup = make(rule)
    grads = gradients(setup, 1)[0]
    grads[3] = None
    before = setup.params[3].clone()
    setup.step(grads)
    setup.step(grads)
    assert torch.equal(setup.params[3], before)
    assert not any(s.any() for s in setup.states[3])
    assert setup.list.steps.tolist() == [2.0, 2.0, 2.0, 0.0, 2.0, 2.0, 2.0, 2.0]


@rules
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_with_a_non_finite_gradient_changes_nothing(rule, bad):
    setup, other = make(rule), make(rule)
    first, spoiled, second = gradients(setup)
    setup.step(first, norm=True)
    other.step(first, norm=True)
    before = setup.bits()
    spoiled[-1][-1] = bad
    setup.step(spoiled, norm=True)
    assert same_bits(setup.bits(), before)
    assert (float(setup.ledger["skipped"]), float(setup.ledger["skip"])) == (1.0, 1.0)
    setup.step(second, norm=True)
    other.step(second, norm=True)
    assert same_bits(setup.bits(), other.bits())
    assert float(setup.ledger["skip"]) == 0.0


@rules
@pytest.mark.isa
@pytest.mark.parametrize("width_name", _C.cpu_widths())
def test_a_term_with_a_zero_coefficient_is_left_out(rule, width_name, width):
    """0 times infinity is NaN: infinite parameters stay what they are, and an infinite gradient moves infinitely."""
    width(width_name)
    found = lists.infinities(make(rule))
    if rule in ("Lars", "Lamb"):
        assert found.isfinite().all()
    elif rule == "MuonMomentum":
        assert found[2] == math.inf
    else:
        assert found[:2].tolist() == [-math.inf, math.inf]
        assert not found.isnan().any()


@rules
def test_the_number_of_threads_changes_no_bit(rule):
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(run(make(rule), norm=True, clip=True, max_norm=1.0).bits())
    finally:
        torch.set_num_threads(threads)
    assert same_bits(*results)


@rules
def test_phases_apart_are_the_step(rule):
    seen = []
    apart = run(make(rule), reduce=lambda tensors: seen.append(len(tensors)), norm=True, clip=True, max_norm=1.0)
    whole = run(make(rule), norm=True, clip=True, max_norm=1.0)
    assert same_bits(apart.bits(), whole.bits())
    assert torch.equal(apart.ledger.values, whole.ledger.values)
    assert seen == ([2, 1] if rule == "Lamb" else [2]) * 3


@rules
def test_two_halves_with_summed_norms_are_the_whole(rule):
    counts = [64, 40_000]
    whole = make(rule, counts)
    halves = [lists.Setup([p.chunk(2)[i].clone() for p in whole.params], rule) for i in range(2)]
    replica = [lists.Setup([p.clone() for p in whole.params], rule, shares=[0.5, 0.5]) for _ in range(2)]
    for grads in gradients(whole):
        options = {"norm": True, "clip": True, "max_norm": 1.0}
        whole.step(grads, **options)
        together(halves, [[g.chunk(2)[i].clone() for g in grads] for i in range(2)], options)
        together(replica, [grads, grads], options)
        for parts in (halves, replica):
            assert float(parts[0].ledger["norm"]) == pytest.approx(float(whole.ledger["norm"]), rel=1e-12)
    for i, p in enumerate(whole.params):
        torch.testing.assert_close(torch.cat([half.params[i] for half in halves]), p, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(replica[1].params[i], p, rtol=1e-5, atol=1e-6)


def together(setups, grads, options):
    """One step of each at once, as processes would, with an all-reduce between them."""
    offered, barrier = [None] * len(setups), threading.Barrier(len(setups))

    def work(rank):
        def reduce(tensors):
            offered[rank] = [tensor.clone() for tensor in tensors]
            barrier.wait(60)
            for i, tensor in enumerate(tensors):
                tensor.copy_(sum(parts[i] for parts in offered))
            barrier.wait(60)

        setups[rank].step(grads[rank], reduce, **options)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(setups))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@rules
@pytest.mark.parametrize("backwards", [False, True])
def test_each_tensor_has_the_scalars_of_its_own(rule, backwards):
    """A thread keeps the rule it made last: here each tensor differs in one respect from that before it."""
    states, scalar = ops.RULES[rule].states, ops.RULES[rule].scalar
    a, b = lists.draw([40, 40], seed=5), lists.draw([40, 40], seed=6)
    each = [  # group, step, scalar, parameter, gradient
        (0, 0.0, scalar, a[0], b[0]),
        (1, 0.0, scalar, a[0], b[0]),
        (1, 3.0, scalar, a[0], b[0]),
        (1, 3.0, scalar and 0.5, a[0], b[0]),
        (1, 3.0, scalar and 0.5, a[1], b[0]),
        (1, 3.0, scalar and 0.5, a[1], b[1]),
        (1, 3.0, scalar and 0.5, a[1], b[1]),
    ][:: -1 if backwards else 1]

    def stepped(some):
        entries = [
            ops.Entry(p.clone(), tuple(torch.zeros(states, 40)), rule, group, step, scalar=kept)
            for group, step, kept, p, _ in some
        ]
        made = ops.TensorList(entries, 2, ops.Ledger(lists.CPU), CHUNK)
        made.set_hyper([ops.RULES[rule].row(lr, lists.RULES[rule].hyper) for lr in (0.05, 0.02)])
        made.set("grad", [g.data_ptr() for *_, g in some])
        call = ops.Call()
        call.inverse = 1.0
        ops.CppBackend().step(made, call)
        return [entry.param for entry in entries]

    together = stepped(each)
    assert same_bits(together, [stepped([one])[0] for one in each])


def test_the_rate_of_a_new_list_at_the_address_of_the_old_is_taken():
    """The rule made last is kept for one pass only: hyper-parameters change where they lie."""
    for lr in (0.5, 0.25, 0.125, 1.0):
        setup = lists.Setup([torch.zeros(3)], "Sgd")
        setup.list.set_hyper([ops.RULES["Sgd"].row(lr, lists.zeroed("Sgd"))])
        setup.step([torch.ones(3)])
        assert torch.equal(setup.params[0], torch.full((3,), -lr))
        setup.list.steps.zero_()  # as of a state_dict that is loaded again
        setup.list.set_hyper([ops.RULES["Sgd"].row(2 * lr, lists.zeroed("Sgd"))])
        setup.step([torch.ones(3)])
        assert torch.equal(setup.params[0], torch.full((3,), -3 * lr))


@pytest.mark.isa
@pytest.mark.parametrize("width_name", _C.cpu_widths())
def test_the_norm_of_few_elements_is_that_of_many_to_the_last_bit(width_name, width):
    width(width_name)
    generator = torch.Generator().manual_seed(3)
    for count in range(1, 41):
        few = torch.randn(count, generator=generator) * 10.0 ** torch.randint(-3, 4, (count,), generator=generator)
        norms = []
        for grad in (few, torch.cat([few, torch.zeros(200)])):
            setup = lists.Setup([torch.zeros(len(grad))], "Sgd")
            setup.step([grad], norm=True)
            norms.append(float(setup.ledger["norm"]))
        assert norms[0] == norms[1]
        assert norms[0] == pytest.approx(float(few.double().norm()), rel=1e-14)


@with_norms
def test_norms_of_each_tensor(rule):
    setup = make(rule)
    before = [(p.double() ** 2).sum() for p in setup.params]
    grads = gradients(setup, 1)[0]
    setup.step(grads)
    param, other = setup.list.norms.T
    torch.testing.assert_close(param, torch.stack(before), rtol=1e-12, atol=0.0)
    if ops.RULES[rule].norms == "gradient":
        torch.testing.assert_close(other, torch.stack([(g.double() ** 2).sum() for g in grads]), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("storage", [name for name in ops.STORAGES if "16" in name] + ["float32"])
def test_the_carried_norm_is_the_one_taken_anew(storage):
    dtype = getattr(torch, storage.split("_")[0])
    carried, anew = (lists.Setup(lists.draw(lists.sizes(), dtype, seed=5), "Lars", storage) for _ in range(2))
    for grads in gradients(carried):
        carried.step(grads)
        held = carried.list.carried.clone()
        assert held.isfinite().all()
        anew.list.forget()
        anew.step(grads)
        assert same_bits(carried.bits(), anew.bits())
    anew.list.forget([2, 3])
    assert anew.list.carried.isnan().tolist() == [i in (2, 3) for i in range(len(anew.params))]


def test_a_carried_norm_is_used():
    setup, other = make("Lars"), make("Lars")
    other.list.carried.fill_(4.0)
    run(setup, 1)
    run(other, 1)
    assert not same_bits(setup.bits(), other.bits())


@with_norms
def test_zero_norms_leave_the_rate_alone(rule):
    count = 40
    zero, ones = torch.zeros(count), torch.ones(count)
    setup = lists.Setup([zero, ones.clone()], rule)
    wanted = lists.follow(setup, [[ones, zero]], lists.RULES[rule].reference)
    setup.step([ones, zero])
    for p, w in zip(setup.params, wanted, strict=True):
        np.testing.assert_allclose(double(p), w, rtol=1e-6)


def test_lion_does_not_move_where_nothing_pulls():
    setup = lists.Setup([torch.ones(3)], "Lion")
    setup.step([torch.tensor([0.0, -0.0, 1.0])])
    decayed = 1.0 - lists.LR * 0.3
    torch.testing.assert_close(setup.params[0], torch.tensor([decayed, decayed, decayed - lists.LR]))


@rules
def test_after_accumulating_the_step_is_the_same(rule):
    setup, plain = make(rule), make(rule)
    for a, b in [gradients(setup, 2, seed) for seed in (1, 3, 5)]:
        setup.accumulate(a, 6.0, first=True)
        setup.accumulate(b, 2.0, weight=2 / 6)
        setup.step([None] * len(a), sum=True, known=True, inverse=6 / 8, clip=True, max_norm=1.0)
        mean = [0.75 * x + 0.25 * y for x, y in zip(a, b, strict=True)]
        plain.step(mean, norm=True, clip=True, max_norm=1.0)
        assert float(setup.ledger["norm"]) == pytest.approx(float(plain.ledger["norm"]), rel=1e-6)
    for p, q in zip(setup.params, plain.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_follow_takes_the_last_verdict_and_no_clipping():
    first = make("Sgd", [8])
    second = lists.Setup(lists.draw([8], seed=9), "MuonMove")
    second.list.table.ledger = first.ledger.values.data_ptr()
    grads = gradients(first, 1)[0]
    for bad in (False, True):
        if bad:
            grads[0][0] = math.nan
        first.step(grads, norm=True, clip=True, max_norm=1e-3)
        ledger, before = first.ledger.values.clone(), second.params[0].clone()
        direction = torch.ones(8)
        second.step([direction], follow=True)
        torch.testing.assert_close(first.ledger.values, ledger, rtol=0.0, atol=0.0, equal_nan=True)
        moved = before * (1 - lists.LR * 0.1) - lists.LR * 1.5
        torch.testing.assert_close(second.params[0], before if bad else moved)
        assert float(second.list.steps) == 1.0


@rules
def test_fp32_parameters_take_16_bit_gradients(rule):
    setup, other = make(rule), make(rule)
    for grads in gradients(setup):
        low = [g.to(torch.bfloat16) for g in grads]
        setup.step(low, norm=True)
        other.step([g.float() for g in low], norm=True)
    assert same_bits(setup.bits(), other.bits())


@pytest.mark.parametrize("begin", [2**31, 2**32, 2**32 + 2**31 - CHUNK])
def test_elements_past_two_to_the_31(begin):
    # A table whose only chunk is far out: addresses are of a tensor that would begin `begin` elements earlier.
    far, near = make("AdamWAmsgrad", [CHUNK]), make("AdamWAmsgrad", [CHUNK])
    far.list.rows[0, _C.columns["numel"]] = begin + CHUNK
    far.list.chunks[0, 1] = begin // CHUNK
    for column in ("param", "state"):
        first = _C.columns[column]
        far.list.rows[0, first : first + (3 if column == "state" else 1)] -= 4 * begin
    grads = gradients(far, 1)[0]
    near.step(grads, norm=True)
    call = far.call(grads, norm=True)
    far.list.rows[0, _C.columns["grad"]] -= 4 * begin
    far.backend.step(far.list, call)
    assert same_bits(far.bits(), near.bits())
    assert float(far.ledger["norm"]) == float(near.ledger["norm"])
