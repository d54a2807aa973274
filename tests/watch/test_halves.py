"""The noise of the halves of a batch: against the gradients of both halves taken by themselves, and what it refuses."""

import copy
import gc
import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pybatch.base.errors import UsageError
from pybatch.noise.outputs import leaves_in
from pybatch.noise.sources.adam_moments import MomentsNoise
from pybatch.noise.sources.examples import ExampleNoise
from pybatch.noise.sources.micro_batches import MicroBatchNoise
from pybatch.watch import noise as sources
from pybatch.watch.batching import BatchSecond, find_batching
from pybatch.watch.halves import HalvesNoise, _Came
from pybatch.watch.noise import NoiseWatch, guarded

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH, WORDS = 5, 11


class Language(nn.Module):
    """As word_language_model: tokens [length, batch], its output of all positions and examples in one dimension."""

    def __init__(self, batch_first=False, flat=True, dropout=0.0, attending=False):
        super().__init__()
        self.batch_first, self.flat = batch_first, flat
        self.embedding = nn.Embedding(WORDS, 8)
        if attending:
            layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=dropout, batch_first=batch_first)
            self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        else:
            self.body = nn.LSTM(8, 8, 2, dropout=dropout, batch_first=batch_first)
        self.head = nn.Linear(8, WORDS)

    def forward(self, tokens):
        out = self.body(self.embedding(tokens))
        out = self.head(out[0] if isinstance(out, tuple) else out)
        return out.view(-1, WORDS) if self.flat else out


CASES = {
    "recurrent, length first, flat": {},
    "recurrent, batch first, flat": {"batch_first": True},
    "recurrent, length first": {"flat": False},
    "attention, length first, flat": {"attending": True},
    "attention, batch first": {"attending": True, "batch_first": True, "flat": False},
}


def tokens_of(model, n, length=LENGTH):
    shape = (n, length) if model.batch_first else (length, n)
    tokens = torch.randint(WORDS, shape)
    return tokens, (tokens + torch.randint(2, shape)) % WORDS


def loss_of(model, batch):
    tokens, targets = batch
    return nn.functional.cross_entropy(model(tokens).reshape(-1, WORDS), targets.reshape(-1))


def gradient(model, batch):
    return torch.cat([g.reshape(-1).double() for g in torch.autograd.grad(loss_of(model, batch), model.parameters())])


def attached(model, optimizer, tokens, **options):
    """The source as a watch makes it, with layers that take the batch second noted before."""
    second = BatchSecond()
    hooks = [m.register_forward_pre_hook(second.see) for m in model.modules()]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return HalvesNoise(model, optimizer, find_batching(((tokens,), {}), second.sizes), **{"every": 1} | options)


def rows_of(noise):
    rows = []
    noise._take = lambda given: rows.extend(given.tolist())
    noise._readback._take = noise._take
    return rows


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n", [6, 5])  # the second: tokens [5, 5], and halves of 2 and 3
def test_the_pairs_are_those_of_both_halves(case, n):
    torch.manual_seed(0)
    model = Language(**CASES[case])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    noise, expected = attached(model, optimizer, tokens_of(model, n)[0]), []
    rows, alone = rows_of(noise), copy.deepcopy(model)
    dim = 0 if model.batch_first else 1
    for step in range(4):
        batch = tokens_of(model, n if step < 3 else 4)  # the last one is smaller
        size = batch[0].shape[dim]
        alone.load_state_dict(model.state_dict())
        ends = [(0, size // 2), (size // 2, size - size // 2)]
        parts = [gradient(alone, [t.narrow(dim, *at) for t in batch]) for at in ends]
        whole = gradient(alone, batch)
        weighted = sum(k * float(g.square().sum()) for k, g in zip((size // 2, size - size // 2), parts, strict=True))
        expected.append([size / 2, size, weighted / size, float(whole.square().sum())])
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    noise._readback.drain()
    assert torch.allclose(torch.tensor(rows), torch.tensor(expected[1:]), rtol=1e-4)
    assert noise.noise.source == "halves"


def test_the_training_goes_on_to_the_bit():
    """Dropout, its random numbers, gradients and weights: as if nobody had looked."""

    def run(watch):
        torch.manual_seed(1)
        model = Language(dropout=0.3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        first = tokens_of(model, 6)
        state = torch.get_rng_state()
        noise = attached(model, optimizer, first[0]) if watch else None
        torch.set_rng_state(state)
        for _ in range(4):
            loss_of(model, tokens_of(model, 6)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        assert noise is None or noise._checked == 3
        return [*(p.detach() for p in model.parameters()), torch.get_rng_state()]

    for plain, seen in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, seen)


class Casting(Language):
    """Runs in bf16 alone, as fused attention of some makes does."""

    def forward(self, tokens):
        out = super().forward(tokens)
        if out.dtype != torch.bfloat16:
            raise TypeError("not in bf16")
        return out


def test_the_model_is_run_again_in_the_autocast_of_its_pass():
    torch.manual_seed(0)
    model = Casting(attending=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        noise = attached(model, optimizer, tokens_of(model, 8)[0])
    rows = rows_of(noise)
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, tokens_of(model, 8))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    noise._readback.drain()
    assert len(rows) == 3


def test_a_scaled_loss_gives_the_same_noise():
    def run(scale):
        torch.manual_seed(0)
        model = Language()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40) if scale else None
        noise = attached(model, optimizer, tokens_of(model, 6)[0], scaler=scaler)
        rows = rows_of(noise)
        for _ in range(3):
            loss = loss_of(model, tokens_of(model, 6))
            (scaler.scale(loss) if scaler else loss).backward()
            scaler.step(optimizer) if scaler else optimizer.step()
            scaler.update() if scaler else None
            optimizer.zero_grad()
        noise._readback.drain()
        return torch.tensor(rows)

    assert torch.allclose(run(False), run(True), rtol=1e-5)


class Mixing(nn.Module):
    """Examples that enter one another's outputs, as in contrastive learning."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        y = self.layer(x)
        return y @ y.t()


class Before(Mixing):
    """Examples that enter the outputs of those before them."""

    def forward(self, x):
        return self.layer(x).flip(0).cumsum(0).flip(0)


class After(Mixing):
    def forward(self, x):
        return self.layer(x).cumsum(0)


class Lossy(Mixing):
    def forward(self, x):
        return self.layer(x).square().mean()


class Pair(Mixing):
    def forward(self, x):
        return self.layer(x), x.sum() * self.layer.weight.sum()


def steps(model, count=5, twice=False):
    """Steps under a source that fails, as a watch has it: what ended it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    kind = guarded(HalvesNoise, ("_leave", "arrived", "_compare", "_step"))
    noise = kind(model, optimizer, find_batching(((torch.randn(6, 4),), {})), every=1)
    for _ in range(count):
        outputs = [model(torch.randn(6, 4)) for _ in range(1 + twice)]
        sum(o.square().mean() for one in outputs for o in (one if isinstance(one, tuple) else (one,))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return noise


@pytest.mark.parametrize("model", [Mixing, Before, After, Lossy])
def test_outputs_that_have_no_examples_are_refused(model):
    assert "can't be parted by examples" in str(steps(model()).broken)


class Raising(Mixing):
    """A model that takes its own order of examples, or none without gradients."""

    def __init__(self, always):
        super().__init__()
        self.always = always

    def forward(self, x):
        if not torch.is_grad_enabled() and (self.always or len(x.unique(dim=0)) < len(x)):
            raise ValueError("these examples are not mine")
        return self.layer(x)


class Counting(Mixing):
    """One that is never twice the same; its count is kept where nobody puts it back."""

    count = itertools.count()

    def forward(self, x):
        return self.layer(x) + next(self.count)


class Undefined(Mixing):
    def forward(self, x):
        return self.layer(x) * float("nan")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Raising(True), "can't be run again to part its output by examples: ValueError: these examples are not mine"),
        (Raising(False), "does not run with the examples in another order: ValueError: these examples are not mine"),
        (Counting(), "gives another output each time"),
        (Undefined(), "holds NaN"),
    ],
)
def test_why_an_output_cannot_be_parted(model, reason):
    assert reason in str(steps(model).broken)


class Choosing(nn.Module):
    """A policy: its output is a distribution that holds one tensor twice, and another made of it."""

    def __init__(self, probs):
        super().__init__()
        self.layer, self.probs = nn.Linear(4, 3), probs

    def forward(self, x):
        chosen = torch.distributions.Categorical(logits=self.layer(x), validate_args=False)
        assert not self.probs or chosen.probs.ndim
        return chosen


@pytest.mark.parametrize("probs", [False, True])
def test_a_distribution_is_one_output(probs):
    torch.manual_seed(0)
    model = Choosing(probs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    noise = HalvesNoise(model, optimizer, find_batching(((torch.randn(6, 4),), {})), every=1)
    rows = rows_of(noise)
    for _ in range(4):
        chosen = model(torch.randn(6, 4))
        (-chosen.log_prob(torch.randint(3, (6,)))).mean().add(-chosen.entropy().mean(), alpha=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
    noise._readback.drain()
    assert len(rows) == 3
    for output in (model(torch.randn(6, 4)), chosen):  # the script has asked the latter for its probs
        assert [leaf is output.logits for leaf in leaves_in(output) if isinstance(leaf, torch.Tensor)] == [True]
    noise.detach()


def test_several_gradients_in_a_step_are_refused():
    assert "several outputs, or passes" in str(steps(Pair()).broken)
    noise = steps(nn.Linear(4, 2), twice=True)
    assert "several outputs, or passes" in str(noise.broken)
    assert not noise.noise.steps


class Node:
    """Of a graph, with how often it was asked where its gradients go."""

    def __init__(self, *after):
        self.after, self.asked = after, 0

    @property
    def next_functions(self):
        self.asked += 1
        return self.after


def test_the_graph_is_walked_once_however_many_outputs_it_has():
    """And not at all until there is a second gradient."""
    nodes = [Node((None, 0))]
    for _ in range(100):
        nodes.append(Node((nodes[-1], 0), (nodes[-1], 0)))
    heads = [Node((nodes[-1], 0)) for _ in range(100)]
    edges = [*(SimpleNamespace(node=node, output_nr=0) for node in [*heads, *reversed(nodes)])]
    came = _Came()
    told = [not came.through(leaf, edge) for leaf, edge in enumerate(edges[:1])]
    assert not any(node.asked for node in [*heads, *nodes])
    told += [not came.through(leaf, edge) for leaf, edge in enumerate(edges[1:], start=1)]
    assert told == [True] * len(heads) + [False] * len(nodes)
    assert {node.asked for node in nodes} == {2}  # for its edges, and the nodes there
    assert not came.through(len(edges), SimpleNamespace(node=nodes[-1], output_nr=1))  # another output of that node


class Nested(Mixing):
    def forward(self, x):
        hidden = self.layer(x)
        return hidden, hidden.tanh()


def test_outputs_of_a_graph_that_was_let_go_are_one():
    """Nobody can tell any more whether they are made of each other; the step is not measured."""
    model = Nested()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    noise = HalvesNoise(model, optimizer, find_batching(((torch.randn(6, 4),), {})), every=1)
    for _ in range(5):
        passes = [model(torch.randn(6, 4)) for _ in range(6)]
        sum(one.square().mean() for one in passes[0]).backward()
        assert noise._came == 1
        optimizer.step()
    assert not noise.noise.steps
    noise.detach()


class Looked(nn.Module):
    """One whose script looks at gradients inside, in one of several ways."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second, self.how, self.seen = nn.Linear(4, 3), nn.Linear(3, 2), how, []

    def forward(self, x):
        h = self.first(x)
        y = self.second(h.tanh())
        if not h.requires_grad:
            return y
        if self.how == "retain_grad":
            h.retain_grad()
            self.hidden = h
        elif self.how == "inside":
            h.register_hook(self.seen.append)
        elif self.how == "output":
            y.register_hook(self.seen.append)
        elif self.how == "elsewhere":
            h.detach().requires_grad_().sum().register_hook(self.seen.append)
        return y


@pytest.mark.parametrize("how", ["retain_grad", "inside", "output", "after", "parameter", "module", "elsewhere", ""])
def test_what_looks_at_gradients_inside_is_refused(how):
    """It would see two gradients more in each step that is measured."""
    plain = dict(vars(torch.Tensor))
    torch.manual_seed(0)
    model = Looked(how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    kind = guarded(HalvesNoise, ("_leave", "arrived", "_compare", "_step"))
    noise = kind(model, optimizer, find_batching(((torch.randn(6, 4),), {})), every=1)
    if how == "parameter":
        model.first.weight.register_hook(model.seen.append)
    elif how == "module":
        model.second.register_full_backward_hook(lambda *given: model.seen.append(given))
    for _ in range(5):
        x = torch.randn(6, 4)
        y = model(x)
        if how == "after":
            y.register_hook(model.seen.append)
        y.square().mean().backward()
        if how == "retain_grad":
            again = copy.deepcopy(model.first)(x).detach().requires_grad_()
            (expected,) = torch.autograd.grad(model.second(again.tanh()).square().mean(), [again])
            assert torch.equal(model.hidden.grad, expected)
        optimizer.step()
        optimizer.zero_grad()
    noise.detach()
    assert {name: vars(torch.Tensor).get(name) for name in plain} == plain
    assert len(vars(torch.Tensor)) == len(plain)
    if how in ("elsewhere", ""):
        assert noise.broken is None
        return
    assert len(model.seen) == (0 if how == "retain_grad" else 5)
    assert "would see more" in str(noise.broken)
    assert not noise.noise.steps


def test_graphs_that_nobody_asks_for_are_let_go():
    held = weakref.WeakSet()

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            held.add(ctx)
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    class Model(Mixing):
        def forward(self, x):
            return Noted.apply(self.layer(x))

    model, first = Model(), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    noise = HalvesNoise(model, optimizer, find_batching(((torch.randn(6, 4),), {})), every=1)
    for _ in range(3):
        model(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()
    gc.collect()
    assert not held
    for i in range(50):
        out = model(torch.randn(6, 4))
        first = out if i == 0 else first
    gc.collect()
    assert len(held) == 5  # the latest four, and the one that the script holds
    (out.square().mean() + first.square().mean()).backward()
    assert noise._came == 2
    optimizer.step()
    assert noise._mixed == 1  # the one whose graph was let go counts
    noise.detach()


def test_a_penalty_on_weights_is_no_part_of_any_example():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    kind = guarded(HalvesNoise, ("_leave", "arrived", "_compare", "_step"))
    noise = kind(model, optimizer, find_batching(((torch.randn(6, 4),), {})), every=1)
    for _ in range(3):
        (model(torch.randn(6, 4)).square().mean() + model.weight.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert "do not add up" in str(noise.broken)
    assert "a penalty on weights" in str(noise.broken)
    assert not noise.noise.steps


def test_hooks_and_batch_norm_are_refused_at_once():
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    with pytest.raises(UsageError, match="BatchNorm1d"):
        steps(model)
    model = nn.Linear(4, 2)
    model.weight.register_hook(lambda g: g)
    with pytest.raises(UsageError, match="'weight' has a hook"):
        steps(model)
    model = nn.Linear(4, 2)
    model.register_full_backward_hook(lambda *given: None)
    with pytest.raises(UsageError, match="backward hooks"):
        steps(model)


def test_it_is_what_a_watch_turns_to_last():
    """A recurrent layer and SGD: neither single examples nor moments; found out once, though made anew."""
    torch.manual_seed(0)
    model = Language(batch_first=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watch = NoiseWatch(model, optimizer, 1, None, False)
    handles = set()
    for _ in range(100):
        batch = (tokens_of(model, 48)[0],) * 2
        if not watch.begun:
            watch.begin(find_batching(((batch[0],), {})), model, (batch[0],), {})
        loss_of(model, batch).backward()
        watch.stepping(6)
        optimizer.step()
        watch.stepped()
        optimizer.zero_grad()
        handles.add(watch._handle)
    found = watch.read()
    assert (found.source, found.status) == ("halves", "resolved"), watch.reasons
    assert not any(p._backward_hooks for p in model.parameters())  # of the source that was tried before
    watch._every, watch._ended = 10 * sources.EVERY, [watch._handle]
    assert watch._make("halves").parting is watch._handle.parting is not None


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return 2 * x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return 2 * grad @ weight, 2 * grad.t() @ x


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return Doubled.apply(x, self.layer.weight) + self.layer.bias


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
def test_a_scripted_model_is_measured_too():
    """Which takes no hooks of its own."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    found = []
    for model in (copy.deepcopy(plain), torch.jit.script(copy.deepcopy(plain))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        noise = HalvesNoise(model, optimizer, find_batching(((torch.randn(6, 4),), {})), every=1)
        rows = rows_of(noise)
        torch.manual_seed(1)
        for _ in range(6):
            model(torch.randn(6, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        noise._readback.drain()
        noise.detach()
        found.append(torch.tensor(rows))
    assert len(found[0]) == 5
    assert torch.allclose(*found, rtol=1e-4)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        return scale * self.layer(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
def test_what_torchscript_is_given_by_keyword_is_said_to_be_unseen():
    model = torch.jit.script(Scaled())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    noise = HalvesNoise(model, optimizer, find_batching(((torch.randn(6, 4),), {})), every=1)
    model(torch.randn(6, 4), scale=2.0).square().mean().backward()
    with pytest.raises(UsageError, match="What TorchScript is given by keyword is not seen: give it by place"):
        optimizer.step()
    noise.detach()


def test_a_source_that_gave_up_in_a_pass_leaves_no_hook_in_the_way():
    model = Custom()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watch = NoiseWatch(model, optimizer, 1, None, False)
    for _ in range(30):
        x = torch.randn(8, 4)
        if not watch.begun:
            watch.begin(find_batching(((x,), {})), model, (x,), {})
        (model(x) - 1).square().mean().backward()
        watch.stepping(8)
        optimizer.step()
        watch.stepped()
        optimizer.zero_grad()
    assert watch._handle.source == "halves", watch.reasons
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (ExampleNoise, "_enter"),
        (ExampleNoise, "_leave"),
        (ExampleNoise, "_close"),
        (MomentsNoise, "_began"),
        (MomentsNoise, "_stepped"),
        (MicroBatchNoise, "_begin"),
        (MicroBatchNoise, "close"),
        (HalvesNoise, "_leave"),
        (HalvesNoise, "arrived"),
        (HalvesNoise, "_step"),
    ],
)
def test_a_source_that_fails_changes_nothing(kind, name):
    """What its hooks give back would be taken for the model's output, or the step's arguments."""

    def broken(self, *given):
        raise ZeroDivisionError

    def run(watch):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        optimizer = torch.optim.Adam(model.parameters())
        if watch:
            bad = type("Bad", (kind,), {name: broken})
            given = {"batching": find_batching(((torch.randn(6, 4),), {})), "every": 1} if kind is HalvesNoise else {}
            noise = guarded(bad, (name,))(model, optimizer, **given)
        torch.manual_seed(0)
        for _ in range(3):
            model(torch.randn(6, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not watch or isinstance(noise.broken, ZeroDivisionError)
        return copy.deepcopy([p.detach() for p in model.parameters()])

    for plain, seen in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, seen)
