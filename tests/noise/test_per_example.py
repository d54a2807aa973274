"""Exact per-example gradient norms against torch.func.vmap(grad) in float64."""

import pytest
import torch
from cases.noise_models import Transformer, cnn, cross_entropy, measured, squared_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pybatch.base.errors import UsageError
from pybatch.noise.per_example import ExampleRecorder, layers, uses

pytestmark = pytest.mark.usefixtures("one_thread")


def truth(model, x, y, loss=squared_error):
    """|g_i|^2 per parameter, by a loop over examples that vmap runs at once."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def one(parameters, x, y):
        return loss(functional_call(model, parameters, (x[None],)), y[None]).sum()

    with sdpa_kernel(SDPBackend.MATH):  # the one that vmap has a rule for
        grads = vmap(grad(one), (None, 0, 0))(parameters, x, y)
    return {name: g.flatten(1).square().sum(1) for name, g in grads.items()}, {
        name: g.mean(0).square().sum() for name, g in grads.items()
    }


def assert_exact(model, x, loss=squared_error, rtol=1e-9, **options):
    """The norms of every parameter, and of the mean gradient, for random targets; the model's own gradient too."""
    model = model.double()
    with torch.no_grad():
        y = model(x)
    y = torch.randint(y.shape[-1], y.shape[:-1]) if loss is not squared_error else torch.randn_like(y)
    expected, mean = truth(model, x, y, loss)
    model.zero_grad()
    loss(model(x), y).mean().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    norms = measured(model, x, y, loss, **options)
    assert norms.by_parameter.keys() == expected.keys()
    for name, sq in norms.by_parameter.items():
        scale = float(expected[name].max()) + 1e-30
        torch.testing.assert_close(sq, expected[name], rtol=rtol, atol=rtol * scale, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(norms.mean_sq[name], mean[name], rtol=rtol, atol=rtol * scale)
        torch.testing.assert_close(model.get_parameter(name).grad, plain[name])
    torch.testing.assert_close(norms.total, sum(expected.values()), rtol=rtol, atol=0.0)
    return norms


def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))


@pytest.mark.parametrize("route", ["auto", "gram", "weight", "fused"])
def test_mlp(route):
    torch.manual_seed(0)
    assert_exact(mlp(), torch.randn(7, 6, dtype=torch.float64), route=route)


@pytest.mark.parametrize("route", ["auto", "gram", "weight", "fused"])
def test_cnn(route):
    torch.manual_seed(0)
    model, x = cnn().double(), torch.randn(5, 3, 9, 8, dtype=torch.float64)
    model(x)  # lazy shapes
    assert_exact(model, x, route=route)


@pytest.mark.parametrize("route", ["auto", "gram", "weight", "fused"])
@pytest.mark.parametrize("positions", ["slice", "rows", "plain"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformer(tied, positions, route):
    torch.manual_seed(0)
    ids = torch.randint(11, (5, 6))
    ids[0] = 4  # a token repeated all through an example
    model = Transformer(tied=tied, positions=positions)
    assert_exact(model, ids, loss=cross_entropy, route=route)


SMALL = st.integers(1, 4)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 5), middle=st.lists(SMALL, max_size=3), into=SMALL, out=SMALL, bias=st.booleans())
def test_linear(n, middle, into, out, bias):
    assert_exact(nn.Linear(into, out, bias), torch.randn(n, *middle, into, dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(
    dimensions=st.integers(1, 3),
    groups=st.integers(1, 2),
    channels=st.tuples(SMALL, SMALL),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
)
def test_convolution(dimensions, groups, channels, kernel, stride, padding, dilation):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    model = kind(groups * channels[0], groups * channels[1], kernel, stride, padding, dilation, groups)
    size = dilation * (kernel - 1) + 2
    assert_exact(model, torch.randn(3, groups * channels[0], *(size + i for i in range(dimensions))).double())


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 4), t=st.integers(1, 9), padding=st.sampled_from([None, 0, -1]))
def test_embedding(n, t, padding):
    assert_exact(nn.Embedding(4, 3, padding), torch.randint(4, (n, t)))
    assert_exact(nn.Embedding(4, 3, padding), torch.randint(4, (n, t, 2)))


NORMS = {
    "layer": (lambda: nn.LayerNorm(5), (4, 3, 5)),
    "layer over two": (lambda: nn.LayerNorm((3, 5)), (4, 3, 5)),
    "layer without bias": (lambda: nn.LayerNorm(5, bias=False), (4, 5)),
    "rms": (lambda: nn.RMSNorm(5), (4, 2, 3, 5)),
    "group": (lambda: nn.GroupNorm(2, 6), (4, 6, 3, 2)),
    "group without positions": (lambda: nn.GroupNorm(2, 6), (4, 6)),
    "instance": (lambda: nn.InstanceNorm1d(6, affine=True), (4, 6, 3)),
    "batch in eval mode": (lambda: nn.BatchNorm1d(6).eval(), (4, 6)),
}


@pytest.mark.parametrize("name", NORMS)
def test_norm_layers(name):
    make, shape = NORMS[name]
    model = make().double()
    for p in model.parameters():
        nn.init.normal_(p)
    assert_exact(model, torch.randn(shape, dtype=torch.float64))


class Custom(nn.Module):
    """A forward of one's own around some parameters."""

    def __init__(self, forward, **parameters):
        super().__init__()
        for name, value in parameters.items():
            if isinstance(value, nn.Module):
                setattr(self, name, value)
            else:
                self.register_parameter(name, nn.Parameter(value))
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


FORWARDS = {
    "layer used three times": (
        lambda m, x: m.a(torch.tanh(m.a(x))).sum(1, keepdim=True) + m.a(x[:, :2]),
        {"a": nn.Linear(4, 4)},
    ),
    "lookup and read-out share a weight": (
        lambda m, x: F.linear(F.embedding((x[..., 0] > 0).long(), m.w) * x, m.w),
        {"w": torch.randn(3, 4)},
    ),
    "matmul": (
        lambda m, x: torch.relu(x @ m.w) @ m.v + m.b,
        {"w": torch.randn(4, 6), "v": torch.randn(6, 2), "b": torch.randn(2)},
    ),
    "scale, shift and positions": (
        lambda m, x: (1.5 * x * m.s - m.b) / m.d + m.p[:, 1:4],
        {"s": torch.randn(4), "b": torch.randn(3, 1), "d": torch.rand(4) + 1, "p": torch.randn(1, 5, 4)},
    ),
    "overlapping selections": (
        lambda m, x: x * m.p[:3] + m.p[1:4] + m.p[[0, 0, 2]].unsqueeze(0) * x + m.p[4],
        {"p": torch.randn(5, 4)},
    ),
    "class token": (
        lambda m, x: torch.cat([m.c.expand(len(x), 2, -1), x], 1) * 2,
        {"c": torch.randn(1, 1, 4)},
    ),
    "a part without gradient": (
        lambda m, x: m.a(x) + m.a(x).detach() + 0 * m.b(x).detach(),
        {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORWARDS)
def test_forward_of_ones_own(name):
    forward, parameters = FORWARDS[name]
    torch.manual_seed(1)
    if name == "a part without gradient":
        model = Custom(forward, **parameters).double()
        x = torch.randn(5, 3, 4, dtype=torch.float64)
        norms = measured(model, x, torch.zeros(5, 3, 4, dtype=torch.float64))
        assert (norms.by_parameter["b.weight"] == 0).all()
        assert (norms.by_parameter["a.weight"] > 0).all()
    else:
        assert_exact(Custom(forward, **parameters), torch.randn(5, 3, 4, dtype=torch.float64))


def test_frozen_parameters_are_left_out():
    model = mlp()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    norms = assert_exact(model, torch.randn(4, 6, dtype=torch.float64))
    assert set(norms.by_parameter) == {"0.bias", "2.weight", "4.weight", "4.bias"}


def test_sum_and_token_mean_agree_with_the_mean():
    torch.manual_seed(0)
    model, ids = Transformer().double(), torch.randint(11, (4, 6))
    tokens = torch.tensor([6, 2, 0, 3])
    kept = torch.arange(6) < tokens[:, None]
    y = torch.randint(11, (4, 6))
    recorder = ExampleRecorder(model)

    def each():
        return (F.cross_entropy(model(ids).flatten(0, 1), y.flatten(), reduction="none").view(4, 6) * kept).sum(1)

    with recorder.record(4) as mean:
        each().mean().backward()
    with recorder.record(4, reduction="sum") as total:
        each().sum().backward()
    with recorder.record(4, weights=tokens) as by_token:
        (each().sum() / tokens.sum()).backward()
    torch.testing.assert_close(mean.total, total.total)
    torch.testing.assert_close(mean.sq_large, total.sq_large)
    expected = torch.where(tokens > 0, mean.total / tokens.clamp(1) ** 2, 0.0)
    torch.testing.assert_close(by_token.total, expected)
    torch.testing.assert_close(by_token.sq_small, (expected * tokens**2).sum() / (tokens**2).sum())
    assert float(by_token.n_small) == float((tokens**2).sum()) / 11
    torch.testing.assert_close(by_token.sq_large, mean.sq_large * (4 / 11) ** 2)
    assert float(by_token.n_large) == 11


@pytest.mark.isa
@pytest.mark.parametrize("route", ["auto", "fused"])
def test_fp32_and_bf16_autocast_are_close(route):
    torch.manual_seed(0)
    model, x, y = mlp(), torch.randn(6, 6), torch.randn(6, 3)
    exact = truth(model.double(), x.double(), y.double())[0]
    model.float()
    single = measured(model, x, y, route=route)
    with torch.autocast("cpu", torch.bfloat16):
        half = measured(model, x, y, route=route)
    for name, sq in exact.items():
        torch.testing.assert_close(single.by_parameter[name], sq, rtol=1e-5, atol=0.0)
        torch.testing.assert_close(half.by_parameter[name], sq, rtol=0.1, atol=0.0)


@pytest.mark.parametrize("t", [1, 32, 63, 64, 96, 128, 192])
def test_gram_in_halves(t):
    """Whole or in blocks, contiguous or not: what the products themselves give."""
    rows, cols = torch.randn(3, 2, t, 7, dtype=torch.float64), torch.randn(3, 2, 5, t, dtype=torch.float64)
    expected = uses.TORCH.weight(rows, cols.mT)
    torch.testing.assert_close(uses.TORCH.gram(rows, cols.mT), expected)
    torch.testing.assert_close(uses.TORCH.gram(rows, cols.mT.contiguous()), expected)


def test_chunks_make_no_difference(monkeypatch):
    monkeypatch.setattr(uses, "CHUNK_BYTES", 1)  # one example at a time
    for route in ("auto", "gram", "weight", "fused"):
        assert_exact(Transformer(), torch.randint(11, (5, 6)), loss=cross_entropy, route=route)


# What a wrong implementation does, and the model that shows it.
def forget_bias(monkeypatch):
    rule = layers.FORMULAS[F.linear]

    def parts(*args, **kwargs):
        first = lambda g: layers.Dense(layers.wide(layers._sequence(g))[:, 0])  # noqa: E731
        return rule.parts(*args, **kwargs) | {"bias": first}

    monkeypatch.setitem(layers.FORMULAS, F.linear, layers.LayerFormula(rule.name, parts, rule.signature))


def forget_padding(monkeypatch):
    windows = layers._windows
    monkeypatch.setattr(layers, "_windows", lambda x, k, s, p, d: windows(x.roll(1, -1), k, s, p, d))


def forget_padding_idx(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "masked_fill", lambda self, mask, value: self)


def drop_cross_terms(monkeypatch):
    monkeypatch.setattr(uses, "_cross", lambda _uses, index, _values: torch.zeros(len(index), dtype=torch.float64))


def drop_repeats(monkeypatch):
    def picked(self, index, values):
        return values.square().sum((1, 2))

    monkeypatch.setattr(uses.Products, "picked", picked)


def take_last_use(monkeypatch):
    joined = uses._joined
    monkeypatch.setattr(uses, "_joined", lambda found, part: joined(found[-1:], part))


def images():
    model = cnn().double()
    x = torch.randn(5, 3, 9, 8, dtype=torch.float64)
    model(x)
    return model, x, squared_error


def sentences():
    ids = torch.randint(11, (5, 6))
    ids[1:3, 2] = 2  # padding
    return Transformer(), ids, cross_entropy


def repeated():
    forward, parameters = FORWARDS["layer used three times"]
    return Custom(forward, **parameters), torch.randn(5, 3, 4, dtype=torch.float64), squared_error


@pytest.mark.parametrize(
    ("mutation", "case"),
    [
        (forget_bias, sentences),
        (forget_padding, images),
        (forget_padding_idx, sentences),
        (drop_cross_terms, sentences),
        (drop_repeats, sentences),
        (take_last_use, repeated),
    ],
)
def test_a_wrong_implementation_is_caught(mutation, case, monkeypatch):
    torch.manual_seed(3)
    model, x, loss = case()
    assert_exact(model, x, loss)
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        assert_exact(model, x, loss)


REFUSED = {
    "LSTM": (nn.LSTM(3, 3), r"'0' \(LSTM\).*recurrent.*source='micro-batches'"),
    "GRU cell": (nn.GRUCell(3, 3), "GRUCell.*recurrent"),
    "attention": (nn.MultiheadAttention(4, 2), "MultiheadAttention.*nn.Linear and scaled_dot_product_attention"),
    "attention inside a layer": (nn.TransformerEncoderLayer(4, 2, 8), r"'0.self_attn'"),
    "BatchNorm": (nn.BatchNorm1d(3), r"'0' \(BatchNorm1d\).*depend on the whole batch.*GroupNorm"),
    "BatchNorm without statistics": (nn.BatchNorm1d(3, track_running_stats=False).eval(), "whole batch"),
    "complex": (nn.Linear(3, 3, dtype=torch.complex64), "'0.weight' is complex"),
    "frozen": (nn.Linear(3, 3).requires_grad_(False), "no parameter that requires a gradient"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_runs(name):
    module, says = REFUSED[name]
    with pytest.raises(UsageError, match=says):
        ExampleRecorder(nn.Sequential(module))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own, when the compiler is imported
def test_compiled_models_are_refused():
    model = nn.Linear(3, 3)
    with pytest.raises(UsageError, match=r"before torch\.compile"):
        ExampleRecorder(torch.compile(model))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        return 2 * w

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


WRONG = {
    "batch second": (
        lambda m, x: m.a(x.transpose(0, 1)),
        r"'a.bias', 'a.weight' has an input of shape \(3, 5, 4\).*must be the first",
    ),
    "batch merged": (lambda m, x: m.a(x.flatten(0, 1)), "shape \\(15, 4\\), and the batch has 5 examples"),
    "unknown function": (lambda m, x: torch.einsum("ntd,d->nt", x, m.p), "einsum.*'p'.*not among the operations"),
    "fused recurrence": (lambda m, x: x @ torch.exp(m.w), "exp.*'w'.*source='micro-batches'"),
    "two parameters": (lambda m, x: x * (m.p + 1), "'p' does not combine it with a tensor that has the batch"),
    "unbatched lookup used otherwise": (lambda m, x: m.a(m.e(torch.arange(3))), "'a.bias', 'a.weight', 'e.weight'"),
    "unseen": (lambda m, x: x + Doubled.apply(m.p), "'p' is also used where it can't be seen"),
    "unseen beside a seen use": (lambda m, x: x * m.p + Doubled.apply(m.p), "'p' is also used where it can't be seen"),
    "kinds of use mixed": (lambda m, x: F.linear(x, m.w) * m.w[0], "'w' is used both in a matrix product"),
    "size at the batch's place": (lambda m, x: x * m.n, "'n' has shape \\(5, 1, 1\\)"),
    "batch statistics": (lambda m, x: F.batch_norm(m.a(x), None, None, training=True), "depend on the whole batch"),
    "renormalized lookup": (lambda m, x: F.embedding((x[..., 0] > 0).long(), m.w, max_norm=1.0), "max_norm"),
    "sparse lookup": (lambda m, x: F.embedding((x[..., 0] > 0).long(), m.w, sparse=True), "sparse=False"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_refused_by_name_where_it_is_met(name):
    forward, says = WRONG[name]
    model = Custom(
        forward,
        a=nn.Linear(4, 4),
        e=nn.Embedding(3, 4),
        p=torch.randn(4),
        w=torch.randn(4, 4),
        n=torch.randn(5, 1, 1),
    )
    recorder = ExampleRecorder(model)
    with pytest.raises(UsageError, match=says), recorder.record(5):
        model(torch.randn(5, 3, 4)).square().sum().backward()
    model.run = lambda m, x: m.a(x)
    with recorder.record(5):  # nothing is left of it
        model(torch.randn(5, 3, 4)).square().sum().backward()


def test_block_without_one_backward():
    model = mlp()
    recorder = ExampleRecorder(model)
    with pytest.raises(UsageError, match="no gradient arrived"), recorder.record(4):
        model(torch.randn(4, 6))
    one, two = torch.randn(2, 4, 6)
    with pytest.raises(UsageError, match="arrived twice"), recorder.record(4):
        (model(one).sum().backward(), model(two).sum().backward())
    for options in ({"n": 0}, {"n": 4, "reduction": "none"}, {"n": 4, "weights": torch.ones(3)}):
        with pytest.raises(UsageError), recorder.record(**options):
            pass
    with pytest.raises(UsageError, match="backend 'cuda'"):
        ExampleRecorder(model, backend="cuda")


def test_a_batch_as_long_as_the_sequence():
    """Positions looked up without a batch dimension: another batch size, seen first, tells them from examples."""
    model, ids = Transformer(positions="plain").double(), torch.randint(11, (6, 6))
    expected = truth(model, ids, ids, cross_entropy)[0]
    recorder = ExampleRecorder(model)
    for n in (4, 6):
        assert not recorder.checked
        with recorder.record(n) as norms:
            cross_entropy(model(ids[:n]), ids[:n]).mean().backward()
    assert recorder.checked
    torch.testing.assert_close(norms.by_parameter["positions.weight"], expected["positions.weight"])
    recorder = ExampleRecorder(model)
    with pytest.raises(UsageError, match=r"either of its first two dimensions may be the batch"), recorder.record(6):
        cross_entropy(model(ids), ids).mean().backward()
    recorder.probe(lambda n: cross_entropy(model(ids[:n]), ids[:n]).mean().backward(), (6, 4))
    assert recorder.checked
    model.zero_grad()
    with recorder.record(6) as norms:
        cross_entropy(model(ids), ids).mean().backward()
    torch.testing.assert_close(norms.total, sum(expected.values()))


def test_ids_of_one_number_each_that_turn_out_to_be_positions():
    """A table looked up by [n] numbers, its rows added to one vector each: only another batch size tells."""
    model, x = Rows().double(), torch.randn(4, 5, dtype=torch.float64)
    recorder = ExampleRecorder(model)
    with recorder.record(4):
        model(x).sum().backward()
    with pytest.raises(UsageError, match="the earlier norms are wrong"), recorder.record(3):
        model(x[:3]).sum().backward()


class Rows(nn.Module):
    """Position embeddings of a fixed length, whatever the batch."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 5)

    def forward(self, x):
        return x[:, None] * self.table(torch.arange(4))


@pytest.mark.parametrize("length", [4, 6])
def test_sequence_first_is_refused(length):
    """[T, B, D]: with T = B its norms would be those of positions, not of examples."""
    model, x = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.LayerNorm(3)), torch.randn(length, 4, 5)
    with pytest.raises(UsageError, match="batch"), ExampleRecorder(model).record(4):
        model(x).sum().backward()
    with pytest.raises(UsageError, match="the batch dimension must be the first"):
        ExampleRecorder(model).probe(lambda n: model(x[:, :n]).sum().backward(), (4, 3))
    scale = Scale()
    with pytest.raises(UsageError, match="batch"), ExampleRecorder(scale).record(4):
        scale(x).sum().backward()


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return x * self.scale


def test_nothing_is_left_in_the_model():
    model = Transformer()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    measured(model, torch.randint(11, (4, 6)), torch.randint(11, (4, 6)), cross_entropy)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    assert all(not p._backward_hooks for p in model.parameters())


def test_checkpointed_blocks():
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    inner = mlp().double()
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = truth(inner, x, torch.zeros(5, 3, dtype=torch.float64))[0]
    model = Custom(lambda m, x: checkpoint(m.inner, x, use_reentrant=False), inner=inner)
    norms = measured(model, x, torch.zeros(5, 3, dtype=torch.float64))
    for name, sq in expected.items():
        torch.testing.assert_close(norms.by_parameter[f"inner.{name}"], sq)


def test_checkpointed_layers_with_long_sequences():
    """Their forward pass runs twice, and must save the same tensors both times."""
    from torch.utils.checkpoint import checkpoint

    layer, x = nn.Linear(6, 6), torch.randn(3, 200, 6)

    def loss(wrap):
        return wrap(lambda v: layer(v).tanh()).square().mean()

    found = []
    for wrap in (lambda f: f(x), lambda f: checkpoint(f, x, use_reentrant=False)):
        with ExampleRecorder(layer).record(len(x)) as norms:
            loss(wrap).backward()
        found.append(norms.total)
    torch.testing.assert_close(*found)
