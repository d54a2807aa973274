"""What `attach` says of a training's own loss: examples that meet in it, labels that it leaves out."""

import contextlib
import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pybatch.noise
import pybatch.optim
from pybatch.noise import loss as looked_at
from pybatch.noise.loss import _PASSES

pytestmark = pytest.mark.usefixtures("one_thread")

N = 6  # examples of a micro-batch
COUPLES, IGNORES = "couples the examples", "ignore index"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    looked_at._looking.clear()  # handles that other tests let go of within a step
    looked_at._put_back()


class Head(nn.Module):
    """[n, 8] to [n, 4], or what `give` makes of it."""

    def __init__(self, give=lambda z: z):
        super().__init__()
        self.net, self.give = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), give

    def forward(self, x):
        return self.give(self.net(x))


class Tokens(nn.Module):
    """[n, 5] token ids to [n, 5, 11]."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11))

    def forward(self, ids):
        return self.net(ids)


def images():
    return torch.randn(N, 8), torch.randint(0, 4, (N,))


def tokens(left=-100):
    ids, length = torch.randint(1, 11, (N, 5)), torch.tensor([5, 1, 4, 2, 5, 3])[:, None]
    return ids, torch.randint(1, 11, (N, 5)).masked_fill(torch.arange(5) >= length, left)


def said(model, loss, draw, passes=1, steps=14, optimizer=None, count=False, **options):
    """The notes of a handle after some steps; `.backward` is as it was before."""
    plain = torch.Tensor.backward
    optimizer = (optimizer or (lambda params: torch.optim.SGD(params, lr=1e-3)))(model.parameters())
    with contextlib.suppress(UserWarning):
        handle = pybatch.noise.attach(model, optimizer, **options)
    for _ in range(steps):
        for _ in range(passes):
            if count:
                handle.count(N)
            (loss(model, *draw()) / passes).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.Tensor.backward is plain
    notes = " ".join(note.text for note in handle.noise.notes)
    handle.detach()
    return notes


def entropy(z, y=None):
    return F.cross_entropy(z / 0.2, torch.arange(len(z)) if y is None else y)


def info_nce(model, x, _):
    one, other = (F.normalize(model(v), dim=1) for v in (x, x + 0.1))
    return entropy(one @ other.T)


def sim_clr(model, x, _):
    """Both views in one pass."""
    one, other = model(torch.cat([x, x + 0.1])).chunk(2)
    return entropy(one @ other.T)


def keys(model, x, _):
    """In-batch negatives that get no gradient."""
    z = model(x)
    return entropy(z @ z.detach().T)


def distances(model, x, _):
    z = model(x)
    return entropy(-(z[:, None] - z[None]).square().sum(-1))


def decorrelated(model, x, _):
    z = model(x)
    return (z.T @ z / len(z) - torch.eye(4)).square().sum()


def centred(model, x, y):
    z = model(x)
    return F.cross_entropy(z - z.mean(0), y)


COUPLED = [info_nce, sim_clr, keys, distances, decorrelated, centred]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("loss", COUPLED)
def test_examples_that_meet_in_the_loss_are_noticed(loss, passes):
    assert COUPLES in said(Head(), loss, images, passes)


def classes(model, x, y):
    return F.cross_entropy(model(x), y)


def as_many_classes(model, x, y):
    """[n, classes] with as many classes as examples is no product of examples."""
    z = model(x)
    return F.cross_entropy(torch.cat([z, z.square()[:, : N - 4]], 1), y)


def weighed(model, x, y):
    return (F.cross_entropy(model(x), y, reduction="none") * torch.rand(N)).mean()


def pairs(model, x, _):
    """Two views, each compared with its own alone."""
    return (model(x) - model(x + 0.1)).square().sum(1).mean()


def linear(model, x, _):
    return model(x).mean()


def penalized(model, x, y):
    return F.cross_entropy(model(x), y) + 0.01 * sum(p.square().sum() for p in model.parameters())


def frozen_head(model, x, y):
    """As many classes as examples, by a head outside the model that is not trained."""
    return F.cross_entropy(model(x) @ torch.randn(4, N), torch.arange(N))


def preferred(model, x, _):
    """Of each two examples of a pass the first is to score higher, as a reward model's: a mean over pairs."""
    better, worse = model(torch.cat([x, x + 0.1])).sum(1).chunk(2)
    return -F.logsigmoid(better - worse).mean()


def triplets(model, x, _):
    one, near, far = model(torch.cat([x, x + 0.1, x.flip(0)])).chunk(3)
    return F.triplet_margin_loss(one, near, far)


APART = [classes, as_many_classes, weighed, pairs, linear, penalized, frozen_head, preferred, triplets]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("loss", APART)
def test_a_mean_over_examples_is_not(loss, passes):
    notes = said(Head(), loss, images, passes)
    assert not any(word in notes for word in (COUPLES, IGNORES))


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-3)


SOURCES = {
    "per-example": {"source": "per-example", "every": 1},
    "every third": {"source": "per-example", "every": 3},
    "adam-moments": {"source": "adam-moments", "optimizer": adamw},
    "micro-batches": {"source": "micro-batches", "passes": 2},
    "a number": {"examples": N, "passes": 2},
}


@pytest.mark.parametrize("source", SOURCES)
def test_by_every_source(source):
    assert COUPLES in said(Head(), decorrelated, images, **SOURCES[source])
    assert COUPLES not in said(Head(), classes, images, **SOURCES[source])


@pytest.mark.parametrize("accumulates", [True, False])
def test_of_a_fused_optimizer(accumulates):
    model = Head()
    optimizer = pybatch.optim.SGD(model.parameters(), lr=1e-3, noise=True)
    handle = pybatch.noise.attach(model, optimizer)
    for _ in range(6):
        for _ in range(2):
            decorrelated(model, *images()).backward()
            if accumulates:
                optimizer.accumulate(N)
        optimizer.step()
        optimizer.zero_grad()
    assert COUPLES in " ".join(note.text for note in handle.noise.notes)


@pytest.mark.parametrize("left", [-100, 0])
@pytest.mark.parametrize("laid", ["flat", "classes second"])
@pytest.mark.parametrize("passes", [1, 2])
def test_labels_that_a_loss_outside_the_model_leaves_out(passes, laid, left):
    def loss(model, ids, labels):
        z = model(ids)
        if laid == "flat":
            return F.cross_entropy(z.flatten(0, 1), labels.flatten(), ignore_index=left)
        return F.nll_loss(F.log_softmax(z, -1).transpose(1, 2), labels, ignore_index=left)

    assert f"ignore index {left}:" in said(Tokens(), loss, lambda: tokens(left), passes)
    assert IGNORES not in said(Tokens(), loss, lambda: tokens(3), passes)


def test_labels_are_not_spoken_of_where_the_user_counts():
    def loss(model, ids, labels):
        return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())

    assert IGNORES not in said(Tokens(), loss, tokens, examples="count", count=True, passes=2, accumulation="weighted")


def test_labels_within_the_model_with_an_index_of_their_own():
    class Both(Tokens):
        def forward(self, ids, labels):
            return F.cross_entropy(self.net(ids).flatten(0, 1), labels.flatten(), ignore_index=-1)

    assert "ignore index -1:" in said(Both(), lambda model, *given: model(*given), lambda: tokens(-1), 2)


def test_each_example_with_as_many_labels_is_not_noticed():
    def half():
        ids, labels = tokens(3)
        return ids, labels.index_fill(1, torch.tensor([0, 1]), -100)

    assert IGNORES not in said(Tokens(), lambda m, x, y: F.cross_entropy(m(x).flatten(0, 1), y.flatten()), half, 2)


def test_a_training_is_the_same_under_the_look():
    """The parameters, to the last bit; and no memory of the outputs is left."""

    def trained(look):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Dropout(0.5), Head())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = pybatch.noise.attach(model, optimizer, "micro-batches") if look else None
        for _ in range(4):
            for _ in range(2):
                info_nce(model, *images()).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert handle is None or not handle._loss._outputs
        return [p.detach().clone() for p in model.parameters()]

    assert all(torch.equal(one, other) for one, other in zip(trained(True), trained(False), strict=True))


def test_hooks_of_the_training_see_what_they_saw():
    """A hook on an output, or a gradient kept there, would count a pass more."""
    seen = []

    def loss(model, x, y):
        z = model(x)
        z.register_hook(lambda g: seen.append(1))
        z.retain_grad()
        total = F.cross_entropy(z, y)
        kept.append((z, y))
        return total

    kept = []
    notes = said(Head(), loss, images, 2, steps=6)
    assert len(seen) == 12
    assert COUPLES not in notes
    z, y = kept[0]
    own = z.detach().requires_grad_()
    (F.cross_entropy(own, y) / 2).backward()
    assert torch.equal(z.grad, own.grad)


class InPlace(torch.autograd.Function):
    """A fused cross entropy that makes its gradient in the forward pass, and scales it where it lies."""

    @staticmethod
    def forward(ctx, z, y):
        ctx.grad = (z.softmax(1) - F.one_hot(y, z.shape[1])) / len(z)
        return F.cross_entropy(z, y)

    @staticmethod
    def backward(ctx, grad):
        return ctx.grad.mul_(grad), None


def retained(model, x, y):
    z = model(x) / 0.5
    z.retain_grad()
    KEPT.append(z)
    return F.cross_entropy(z, y)


def hooked(model, x, y):
    z = model(x) / 0.5
    z.register_hook(lambda g: CALLS.append(1))
    return F.cross_entropy(z, y)


def through_a_hooked_module(model, x, y):
    loss = nn.CrossEntropyLoss()
    loss.register_full_backward_hook(lambda *_: CALLS.append(1))
    return loss(model(x), y)


KEPT, CALLS = [], []


@pytest.mark.parametrize("loss", [lambda m, x, y: InPlace.apply(m(x), y), retained, hooked, through_a_hooked_module])
@pytest.mark.parametrize("passes", [1, 2])
def test_what_would_be_told_of_a_pass_more_is_not(loss, passes):
    """The same parameters, the same gradients kept and as many calls as without a handle, to the last bit."""
    found = []
    for look in (False, True):
        torch.manual_seed(2)
        KEPT.clear()
        CALLS.clear()
        model = Head()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = pybatch.noise.attach(model, optimizer, "micro-batches") if look else None
        for _ in range(4):
            for _ in range(passes):
                loss(model, *images()).backward()
            optimizer.step()
            optimizer.zero_grad()
        kept = [z.grad for z in KEPT]
        found.append((torch.cat([p.detach().flatten() for p in model.parameters()]), kept, len(CALLS)))
        if handle is not None:
            handle.detach()
    (one, kept, calls), (other, own, called) = found
    assert torch.equal(one, other)
    assert calls == called
    assert all(map(torch.equal, kept, own))


def test_a_model_that_is_compiled_after_attaching_trains():
    model = Head()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = pybatch.noise.attach(model, optimizer, "micro-batches")
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        for _ in range(2):
            F.cross_entropy(compiled(images()[0]), images()[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert handle.noise.steps == 3


def test_outputs_of_an_unknown_kind_are_left_alone():
    model = nn.Linear(8, 4)
    handle = pybatch.noise.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), "micro-batches", examples=2)
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(2, 8)], layout=torch.jagged)
    model(nested).values().square().mean().backward()
    handle.detach()


def test_time_first_where_the_user_says_how_many_examples_there_are():
    def loss(model, x, y):
        return F.cross_entropy(model(x).mean(0), y)

    def drawn():
        return torch.randn(9, N, 8), torch.randint(0, 4, (N,))

    assert COUPLES not in said(Head(), loss, drawn, 2, examples=N)


def test_labels_with_time_first_are_not_uneven_for_it():
    def loss(model, ids, labels):
        labels = labels.scatter(1, torch.randint(0, 5, (N, 1)), -100)  # one of each example
        return F.cross_entropy(model(ids).transpose(0, 1).flatten(0, 1), labels.T.flatten())

    assert IGNORES not in said(Tokens(), loss, lambda: tokens(3), 2)


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_in_half_precision_under_a_scaled_loss(scale):
    def loss(model, x, _):
        one, other = (F.normalize(model(v).half(), dim=1) for v in (x, x + 0.1))
        return entropy((one @ other.T).float()) * scale

    notes = said(Head(), loss, images, 2, optimizer=lambda params: torch.optim.SGD(params, lr=1e-9))
    assert COUPLES in notes


def test_a_loss_without_second_derivatives_trains_on():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return z.square().mean()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            (z,) = ctx.saved_tensors
            return 2 * grad * z / z.numel()

    assert COUPLES not in said(Head(), lambda m, x, y: Once.apply(m(x)), images, 2)


def test_a_training_whose_backward_passes_are_not_seen_is_left_alone():
    """By torch.autograd.backward and grad: after some passes nothing of the training is held."""
    plain = torch.Tensor.backward
    model = Head()
    handle = pybatch.noise.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), "micro-batches")
    for _ in range(_PASSES + 1):
        torch.autograd.backward(classes(model, *images()))
    assert torch.Tensor.backward is plain
    assert not handle._loss._outputs
    handle.detach()


def test_the_loss_of_another_model_is_not_taken_for_this_ones():
    one, other = Head(), Head()
    optimizer = torch.optim.SGD([*one.parameters(), *other.parameters()], lr=0.1)
    handle = pybatch.noise.attach(one, optimizer, "micro-batches")
    for _ in range(3):
        for _ in range(2):
            loss = classes(one, *images())
            decorrelated(other, *images()).backward()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert COUPLES not in " ".join(note.text for note in handle.noise.notes)


def test_two_handles_at_once_and_the_end_of_one():
    plain = torch.Tensor.backward
    one, other = Head(), Head()
    handles = [pybatch.noise.attach(m, torch.optim.SGD(m.parameters(), lr=0.1), "micro-batches") for m in (one, other)]
    losses = [classes(one, *images()), decorrelated(other, *images())]
    assert torch.Tensor.backward is not plain
    handles[0].detach()
    for loss in losses:
        loss.backward()
    decorrelated(other, *images()).backward()
    assert torch.Tensor.backward is plain
    assert COUPLES in " ".join(note.text for note in handles[1]._of_loss())
    handles[1].detach()


def test_a_model_that_is_let_go_of_takes_the_look_along():
    plain = torch.Tensor.backward
    model = Head()
    handle = pybatch.noise.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), "micro-batches")
    classes(model, *images()).backward()
    assert torch.Tensor.backward is not plain  # the second is awaited
    del model, handle
    gc.collect()
    assert torch.Tensor.backward is plain


def test_a_method_taken_before_is_called_after():
    model = Head()
    handle = pybatch.noise.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), "micro-batches")
    taken = classes(model, *images()).backward
    handle.detach()
    taken()
    assert model.net[0].weight.grad is not None


def test_what_others_put_over_it_stays_and_is_called(monkeypatch):
    """Another tool's wrapper of `.backward`, put there while one is awaited; and a handle after it."""
    called = []

    def begun():
        model = Head()
        handle = pybatch.noise.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), "micro-batches")
        return handle, decorrelated(model, *images())

    handles = [begun()]
    ours = torch.Tensor.backward

    def theirs(self, *given, **named):
        called.append(1)
        return ours(self, *given, **named)

    monkeypatch.setattr(torch.Tensor, "backward", theirs)
    handles[0][1].backward()
    handles[0][0].detach()
    handles.append(begun())
    handles[1][1].backward()
    for handle, _ in handles:
        assert COUPLES in " ".join(note.text for note in handle._of_loss())
        handle.detach()
    assert len(called) == 2
    assert torch.Tensor.backward is theirs
    monkeypatch.undo()
    looked_at._put_back()


def test_a_backward_pass_where_gradients_are_off():
    model = Head()
    handle = pybatch.noise.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), "micro-batches")
    output = decorrelated(model, *images())
    with torch.no_grad():
        output.backward()
    assert COUPLES in " ".join(note.text for note in handle._of_loss())
    handle.detach()
