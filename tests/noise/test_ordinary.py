"""Loops with one backward pass a step: exact per-example norms in `attach`, and what takes over by itself."""

import copy
import io
import math
import re
import warnings

import pytest
import torch
from cases.noise_models import MODELS, Transformer, example_gradients, images, loss_of, mlp
from torch import nn

import pybatch.noise
from pybatch.base.errors import UsageError
from pybatch.base.numerals import number
from pybatch.fits.noise import pair
from pybatch.noise.ordinary import SINGLE

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def step(model, optimizer, *batches, factor=None):
    for x, y in batches:
        (loss_of(model(x), y) * (1 / len(batches) if factor is None else factor(len(y)))).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("accumulation", ["mean", "sum", "weighted"])
def test_per_example_norms_are_the_loop_over_examples(name, accumulation):
    make, draw = MODELS[name]
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = pybatch.noise.attach(model, optimizer, "per-example", layers=True, every=2, accumulation=accumulation)
    truth = []
    for i, sizes in enumerate(((6,), (3,), (6, 4), (5, 5))):
        batches = [draw(n) for n in sizes]
        if i % 2 == 0:
            found = [example_gradients(model, *batch)[0] for batch in batches]
            small = sum(float(f.square().sum(1).mean()) for f in found) / len(found)
            large = sum(float(f.mean(0).square().sum()) for f in found) / len(found)
            truth.append(pair(small, large, 1.0, len(found) / sum(1 / n for n in sizes)))
        total = sum(sizes)
        factor = {"mean": None, "sum": lambda n: 1.0, "weighted": lambda n, total=total: n / total}[accumulation]
        step(model, optimizer, *batches, factor=factor)
    noise = handle.noise
    assert (noise.source, noise.steps, noise.small_batch, noise.last_step) == ("per-example", 2, 1, 4)
    assert noise.grad_sq == pytest.approx(sum(t[0] for t in truth) / 2, rel=1e-4)
    assert noise.trace == pytest.approx(sum(t[1] for t in truth) / 2, rel=1e-4)
    assert len(noise.layers) == len(list(model.parameters()))
    assert sum(layer.trace for layer in noise.layers) == pytest.approx(noise.trace, rel=1e-4)


def test_a_watched_training_is_the_training():
    """The same parameters after some steps, to the last bits, with and without the watch."""
    ids = torch.randint(0, 11, (3, 5, 6))
    found = []
    for watched in (False, True):
        torch.manual_seed(1)
        model = Transformer()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if watched:
            handle = pybatch.noise.attach(model, optimizer, "per-example", every=1)
        for own in ids:
            nn.functional.cross_entropy(model(own).flatten(0, 1), own.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert handle.noise.steps == 3


def regression(optimizer_of):
    """x ~ N(0, I_63) without label noise: B_simple is 64, always."""
    model = nn.Linear(63, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = optimizer_of(model.parameters())
    return model, optimizer, pybatch.noise.attach(model, optimizer)


def test_an_ordinary_loop_is_resolved():
    model, optimizer, handle = regression(lambda p: torch.optim.SGD(p, lr=0.0))
    for _ in range(300):
        x = torch.randn(32, 63)
        (0.5 * (model(x)[:, 0] - 0.5 * x.sum(1)).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    noise = handle.noise
    assert (noise.source, noise.status) == ("per-example", "resolved")
    assert noise.low <= 64 <= noise.high
    assert noise.high < 2 * noise.low
    again = pybatch.noise.attach(model, optimizer)
    again.load_state_dict(handle.state_dict())
    assert again.noise.b_simple == noise.b_simple


def test_micro_batches_stay_where_steps_have_several():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = pybatch.noise.attach(model, optimizer)
    for _ in range(2 * SINGLE):
        step(model, optimizer, images(4), images(4))
    step(model, optimizer, images(4))
    assert (handle.source, handle.noise.steps) == ("micro-batches", 2 * SINGLE)


class Opaque(nn.Module):
    """Its parameter meets an operation whose per-example gradients are not known."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 36))

    def forward(self, x):
        return torch.einsum("ni,oi->no", x.flatten(1), self.weight)


@pytest.mark.parametrize("model", [MODELS["lstm"], (Opaque, images)])
def test_adams_moments_take_over_where_a_layer_is_not_known(model):
    make, draw = model
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    handle, plain = pybatch.noise.attach(model, optimizer), copy.deepcopy(model)
    own = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    for _ in range(40):
        batch = draw(4)
        step(model, optimizer, batch)
        step(plain, own, batch)
    assert handle.source == "adam-moments"
    assert handle.noise.steps >= 1
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p == q).all()


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
@pytest.mark.parametrize(("clip", "factor"), [(0.5, 1.0), (0.75, 1.0), (5e-4, 1e-3), (math.inf, 1.0), (math.inf, 1e-3)])
def test_a_script_that_clips_distorts_adams_moments_and_is_told_so(clip, factor, scale):
    """Steps that were clipped share one norm, whatever scaled the loss; without clipping no three of a window do.

    torch divides by the norm and 1e-6, which small norms feel.
    """
    make, draw = MODELS["lstm"]
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
    handle = pybatch.noise.attach(model, optimizer, "adam-moments")
    steps, norms = 210, []
    for step in range(steps):
        x, y = draw(4)
        scaler.scale(factor * loss_of(model(x), y)).backward()
        scaler.unscale_(optimizer)
        bound = clip if step > 20 else math.inf  # it begins later, and longer norms came before
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), bound)) if step > 20 else 0.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    clipped = sum(norm > clip for norm in norms)
    said = [n.text for n in handle.noise.notes if "as where a script clips" in n.text]
    if clip == math.inf:
        assert not said
    else:
        assert 20 <= clipped < steps - 20
        tied = int(re.match(r"(\d+) of 210 steps share one norm of their gradients with others", said[0])[1])
        assert clipped - 64 <= tied <= clipped  # but for the window in which it begins
        assert tied >= 0.6 * clipped
        assert f"{number(clip)} in the last" in said[0]


def test_clipping_within_a_closure_is_noticed():
    """Gradients are those that the update had, also where a closure makes them and clears them afterwards."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    handle = pybatch.noise.attach(model, optimizer, "adam-moments")
    for _ in range(70):
        x, y = images(4)

        def closure(x=x, y=y):
            loss = loss_of(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            return loss

        optimizer.step(closure)
        optimizer.zero_grad()
    assert any("64 of 64 steps share" in n.text or "70 of 70 steps share" in n.text for n in handle.noise.notes)


def test_where_nothing_can_take_over_the_first_steps_name_the_remedies():
    make, draw = MODELS["lstm"]
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = pybatch.noise.attach(model, optimizer)
    for _ in range(SINGLE):
        step(model, optimizer, draw(4))
    with pytest.warns(UserWarning, match="one backward pass") as caught:
        step(model, optimizer, draw(4))
    said = str(caught[0].message)
    for remedy in ("two or more backward passes", "source='adam-moments'", "measure_noise", "LSTM"):
        assert remedy in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer, draw(4))
    step(model, optimizer, draw(4), draw(4))
    assert handle.noise.steps == 1


def test_an_unknown_layer_is_refused_where_the_source_was_asked_for():
    model = MODELS["lstm"][0]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match="LSTM"):
        pybatch.noise.attach(model, optimizer, "per-example")
    model = Opaque()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match="'count'"):
        pybatch.noise.attach(model, optimizer, "per-example", examples="count")
    for every in (0, 2.5, "3"):
        with pytest.raises(UsageError, match="every"):
            pybatch.noise.attach(model, optimizer, "per-example", every=every)
    pybatch.noise.attach(model, optimizer, "per-example")
    with pytest.raises(UsageError, match="'weight'"):
        model(images(4)[0])


def test_a_forward_pass_that_is_interrupted_is_watched_no_longer_than_to_the_next() -> None:
    """Ctrl-C skips torch's hooks at the end of forward()."""
    from torch.overrides import _get_current_function_mode_stack

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    handle = pybatch.noise.attach(model, optimizer, source="per-example", every=1)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model[1].register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(8, 3))
    hook.remove()
    for _ in range(2):
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert _get_current_function_mode_stack() == []
    assert handle.noise.steps == 2


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    assert b"pybatch" not in file.getvalue()  # it is loaded where there is none, and with weights_only=True
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
@pytest.mark.parametrize("source", [None, "micro-batches", "per-example"])
def test_a_copy_of_the_model_is_not_watched(source, copied):
    """An average of weights that is run in training mode, between the forward passes of a step and after a copied
    watch was cut, adds nothing and leaves the training's own watch where it is."""
    found = []
    for copies in (False, True):
        torch.manual_seed(0)
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kept = {"every": 1} if source == "per-example" else {}
        handle = pybatch.noise.attach(model, optimizer, source, **kept)
        data = [[images(6), images(6)] for _ in range(4)] + [[images(6)] for _ in range(SINGLE + 3)]
        if source is None:
            data = data[4:]
        for batches in data:
            for x, y in batches:
                loss = loss_of(model(x), y)
                if copies:
                    loss_of(copied(model)(x), y)
                (loss / len(batches)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(handle.noise)
        handle.detach()
        assert not model._forward_hooks
        assert not model._forward_pre_hooks
    assert found[0] == found[1]
    assert found[0].steps > 0
    assert not torch.overrides._get_current_function_mode_stack()
