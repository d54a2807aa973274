"""Folded layers of a stack against `vmap` alone: the same losses and gradients, without copies between layers."""

import contextlib
import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from pybatch.scaling import Scaled
from pybatch.training import folding, stack
from pybatch.training.folding import Folding
from pybatch.training.loop import Loop
from pybatch.training.stack import Stack
from pybatch.training.trial import Trial
from pybatch.training.updates import arguments
from pybatch.workloads.base import Workload
from pybatch.workloads.running.finding import find

CPU = torch.device("cpu")
REPLICAS = 3


class View(nn.Module):
    def forward(self, images):
        return images.view(len(images), -1).sin()


class Shared(nn.Module):
    """A convolution of each replica's images with a kernel that all have, and of one image with each replica's own."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(2, 8, 3, 3))

    def forward(self, images):
        fixed = torch.linspace(0, 1, 8 * 8 * 4 * 4).sin().reshape(8, 8, 4, 4).to(images)
        return functional.conv2d(images, fixed).mean() * functional.conv2d(fixed, self.kernel).sin()


LAYERS = {
    "max pool": nn.MaxPool2d(2),
    "max pool, padded": nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
    "max pool with its places": nn.MaxPool2d(2, return_indices=True),
    "mean pool": nn.AvgPool2d(2, padding=1, count_include_pad=False),
    "adaptive pool": nn.AdaptiveAvgPool2d((3, 1)),
    "group norm": nn.GroupNorm(2, 8),
    "group norm without parameters": nn.GroupNorm(4, 8, affine=False),
    "strided": nn.Conv2d(8, 4, 3, stride=(2, 1), padding=1),
    "groups, no bias": nn.Conv2d(8, 12, 3, groups=4, bias=False),
    "dilated, same": nn.Conv2d(8, 4, 3, padding="same", dilation=2),
    "circular": nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"),
    "one by one": nn.Conv2d(8, 3, 1),
    "transposed": nn.ConvTranspose2d(8, 4, 3),
    "batch norm": nn.BatchNorm2d(8, track_running_stats=False),
    "in place": nn.ReLU(inplace=True),
    "view": View(),
    "layer norm": nn.LayerNorm((8, 8, 8)),
    "enlarged": nn.Upsample(scale_factor=2, mode="bilinear"),
    "shared": Shared(),
}


def stacked(layer):
    """The losses of replicas, and the gradients of their parameters, as a function of whether images are folded."""
    torch.manual_seed(0)
    models = [
        nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.GELU(), copy.deepcopy(layer)).double() for _ in range(REPLICAS)
    ]
    for model in models:
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
    parameters, _ = stack_module_state(models)
    images = torch.randn(REPLICAS, 5, 1, 8, 8, dtype=torch.float64)

    def one(parameters, images):
        out = functional_call(models[0], parameters, (images,))
        out = out[0] if isinstance(out, tuple) else out
        return (out * torch.arange(out.numel()).reshape(out.shape).sin()).sum() + out.square().mean()

    def run(folded):
        with Folding() if folded else contextlib.nullcontext():
            losses = torch.vmap(one)(parameters, images)
        return losses, torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)

    return run


@pytest.mark.parametrize("name", LAYERS)
def test_losses_and_gradients_are_those_of_vmap(name):
    run = stacked(LAYERS[name])
    expected, found = run(False), run(True)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    for theirs, mine in zip(expected[1], found[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("masked", "causal"), [(None, False), (None, True), ("shared", False), ("own", False)])
@pytest.mark.parametrize("own_keys", [True, False])
def test_attention_is_that_of_each_replica(masked, causal, own_keys, recwarn):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query = drawn(REPLICAS, 5, 2, 7, 4).requires_grad_()
    key, value = (drawn(REPLICAS, 5, 2, 6, 4) if own_keys else drawn(5, 2, 6, 4) for _ in range(2))
    mask = {None: None, "shared": drawn(7, 6), "own": drawn(REPLICAS, 5, 1, 7, 6)}[masked]
    dims = (0, 0 if own_keys else None, 0 if own_keys else None, 0 if masked == "own" else None)

    def attention(query, key, value, mask):
        return functional.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=0.7)

    with Folding(images=False):
        found = torch.vmap(attention, in_dims=dims)(query, key, value, mask)
    assert not [warning for warning in recwarn if "performance drop" in str(warning.message)]
    parts = []
    for r in range(REPLICAS):
        own = [each if dim is None else each[r] for each, dim in zip((query, key, value, mask), dims, strict=True)]
        parts.append(attention(*own))
    expected = torch.stack(parts)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = drawn(*expected.shape)
    [mine], [theirs] = (torch.autograd.grad((each * weights).sum(), query) for each in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_a_batch_too_large_for_a_gpu_is_taken_in_parts(monkeypatch, masked):
    """torch's kernels fail with more than 65 535 heads x examples; the replicas of a stack multiply them."""
    query, key, value = (torch.randn(REPLICAS, 5, 2, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.randn(REPLICAS, 5, 1, 7, 7, dtype=torch.float64) if masked else None
    sizes = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "scaled_dot_product" in str(func) and "backward" not in str(func):
                sizes.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    def attention(query, key, value, mask):
        return functional.scaled_dot_product_attention(query, key, value, mask)

    def run(most):
        monkeypatch.setattr(folding, "most_at_once", most)
        sizes.clear()
        with Folding(images=False), Calls():
            found = torch.vmap(attention, in_dims=(0, 0, 0, 0 if masked else None))(query, key, value, mask)
        return found, *torch.autograd.grad(found.square().sum(), (query, key, value))

    whole = run(len)
    assert sizes == [5 * REPLICAS]
    for mine, theirs in zip(run(lambda query: 4), whole, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert sizes == [4, 4, 4, 3]


def test_the_parts_stay_within_the_limits_of_torchs_kernels():
    class Query:
        def __init__(self, *shape, kind="cuda"):
            self.shape, self.device = shape, torch.device(kind)

    assert folding.most_at_once(Query(36 * 8192, 4, 64, 32)) == 65535 // 4
    assert folding.most_at_once(Query(100, 4, 64, 32)) == 100
    assert folding.most_at_once(Query(36 * 8192, 4, 64, 32, kind="cpu")) == 36 * 8192
    assert folding.most_at_once(Query(10**6, 4, 10_496, 128)) == 2**31 // (4 * 10_496 * 128)
    assert folding.most_at_once(Query(3, 70_000, 64, 32)) == 1  # then torch says what is wrong
    assert folding.most_at_once(Query(0, 4, 64, 32)) == 0


def test_attention_with_dropout_is_refused_as_without_folding():
    some = torch.randn(REPLICAS, 5, 2, 7, 4)
    with pytest.raises(RuntimeError, match="random"), Folding():
        torch.vmap(lambda x: functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1))(some)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_a_torch_layer_is_not_looped_over_replicas(masked, recwarn):
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double() for _ in range(REPLICAS)]
    parameters, _ = stack_module_state(layers)
    words = torch.randn(REPLICAS, 5, 7, 8, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64) if masked else None

    def one(parameters, words):
        return functional_call(layers[0], parameters, (words,), {"src_mask": mask, "is_causal": masked}).square().sum()

    with Folding(images=False):
        losses = torch.vmap(one)(parameters, words)
    found = torch.autograd.grad(losses.sum(), list(parameters.values()))
    assert not [warning for warning in recwarn if "performance drop" in str(warning.message)]
    for r, layer in enumerate(layers):
        loss = layer(words[r], src_mask=mask, is_causal=masked).square().sum()
        torch.testing.assert_close(losses[r], loss, rtol=1e-12, atol=1e-12)
        for mine, theirs in zip(found, torch.autograd.grad(loss, list(layer.parameters())), strict=True):
            torch.testing.assert_close(mine[r], theirs, rtol=1e-9, atol=1e-11)


def test_a_stack_of_transformers_trains_as_the_loop_does(recwarn):
    workload, some = find("text", options=["length=16"]), trials(4)
    apart, together = Loop(workload, some, CPU), Stack(workload, some, CPU)
    for made in (apart, together):
        made.advance(3)
    np.testing.assert_allclose(together._evaluate(True), apart.evaluate(), rtol=1e-4)
    assert together.folded is False
    assert not [warning for warning in recwarn if "performance drop" in str(warning.message)]


class Copies(TorchDispatchMode):
    """Counts copies of tensors of more than `LARGE` elements."""

    LARGE = 16 * REPLICAS * 8 * 8  # the batch, of one channel

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if name.startswith(("aten.clone", "aten.copy_", "aten._to_copy")) and out.numel() > self.LARGE:
            self.count += 1
        return out


def test_images_are_not_copied_from_layer_to_layer():
    layers = [
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
    ]
    models = [nn.Sequential(*copy.deepcopy(layers)) for _ in range(REPLICAS)]
    parameters, _ = stack_module_state(models)
    images = torch.randn(REPLICAS, 16, 1, 8, 8)
    counts = {}
    for folded in (False, True):
        with Copies() as copies, Folding() if folded else contextlib.nullcontext():
            torch.vmap(lambda p, x: functional_call(models[0], p, (x,)).sum())(parameters, images)
        counts[folded] = copies.count
    assert counts == {False: 2, True: 0}


def test_channels_come_last_in_memory_from_images_of_one_channel_on():
    kernels, images = torch.randn(REPLICAS, 4, 1, 3, 3), torch.randn(REPLICAS, 16, 1, 8, 8)
    with Folding():
        found = torch.vmap(functional.conv2d, out_dims=1)(images, kernels)
    assert found.shape == (16, REPLICAS, 4, 6, 6)
    assert found.permute(0, 3, 4, 1, 2).is_contiguous()


def trials(batch, dtype="fp32"):
    group = arguments("sgd", {"momentum": 0.9})
    return [
        Trial("t", "sgd", Scaled(group | {"lr": lr}), batch, seed, dtype, "cpu")
        for lr in (0.02, 0.1)
        for seed in (0, 1)
    ]


@pytest.mark.isa
@pytest.mark.parametrize(
    ("model", "dtype", "rtol"), [("cnn", "fp32", 1e-4), ("resnet", "fp32", 1e-4), ("cnn", "bf16", 3e-2)]
)
def test_a_folded_stack_trains_as_the_loop_does(model, dtype, rtol):
    workload, some = find("digits", model=model), trials(8, dtype)
    apart, together = Loop(workload, some, CPU), Stack(workload, some, CPU)
    together.folded = True
    for made in (apart, together):
        made.advance(4)
    np.testing.assert_allclose(together.evaluate(), apart.evaluate(), rtol=rtol)


def test_folding_is_measured_once_and_the_faster_way_is_taken(monkeypatch):
    workload = find("digits", model="cnn")
    real = Stack._gradients
    for slow in (True, False):
        clock, calls = [0.0], []

        def gradients(self, batch, folded, slow=slow, clock=clock, calls=calls):
            calls.append(folded)
            clock[0] += 2.0 if folded is slow else 1.0
            return real(self, batch, folded)

        monkeypatch.setattr(Stack, "_gradients", gradients)
        monkeypatch.setattr(stack.time, "perf_counter", lambda clock=clock: clock[0])
        made = Stack(workload, trials(4), CPU)
        made.advance(3)
        assert made.folded is not slow
        assert calls == [False, True, False, True] + 3 * [not slow]


def test_a_model_without_images_is_not_measured(monkeypatch):
    made = Stack(find("digits", model="mlp"), trials(4), CPU)
    monkeypatch.setattr(stack, "time", None)
    made.advance(1)
    assert made.folded is False


def test_measuring_leaves_running_means_alone():
    class Normed(Workload):
        name, examples = "normed", 64

        def model(self):
            return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 1))

        def batch(self, n, generator, split="train"):
            return torch.randn(n, 1, 8, 8, generator=generator)

        def loss(self, model, batch):
            return model(batch).square().mean()

    made, measured = Stack(Normed(), trials(4), CPU), Stack(Normed(), trials(4), CPU)
    made.folded = False
    for each in (made, measured):
        each.advance(1)
    for key, value in made.buffers.items():
        torch.testing.assert_close(measured.buffers[key], value, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_folded_is_left_to_vmap(monkeypatch):
    def refuse(self, func, types, args=(), kwargs=None):
        self.used = True
        if not self.images:
            return func(*args, **(kwargs or {}))
        raise RuntimeError("NYI: querying is_contiguous inside of vmap")

    made = Stack(find("digits", model="cnn"), trials(4), CPU)
    monkeypatch.setattr(Folding, "__torch_function__", refuse)
    made.advance(2)
    assert made.folded is False


def test_an_embedding_does_not_train_its_padding_in_any_replica():
    torch.manual_seed(0)
    weight = torch.randn(REPLICAS, 5, 4, requires_grad=True)
    words = torch.tensor([[0, 1, 3], [3, 4, 2], [3, 3, 1]])
    for padding in (3, -2):
        with Folding():
            found = torch.vmap(lambda w, x, padding=padding: functional.embedding(x, w, padding))(weight, words)
        torch.testing.assert_close(found, torch.stack([w[x] for w, x in zip(weight, words, strict=True)]))
        [grad] = torch.autograd.grad(found.sum(), weight)
        assert grad[:, 3].eq(0).all()
        assert grad.sum((1, 2)).tolist() == [8, 8, 4]  # of the other words


@pytest.mark.parametrize("flat", [lambda y: y.view(len(y), -1), lambda y: y.reshape(len(y), -1)])
def test_images_changed_through_a_view_are_not_folded(flat, monkeypatch):
    class Halved(nn.Module):
        def forward(self, images):
            flat(images).mul_(0.5)
            return images

    class Changing(Workload):
        name, examples = "changing", 64

        def model(self):
            return nn.Sequential(nn.Conv2d(1, 4, 3), Halved(), nn.Conv2d(4, 2, 3))

        def batch(self, n, generator, split="train"):
            return torch.randn(n, 1, 8, 8, generator=generator)

        def loss(self, model, batch):
            return model(batch).square().mean()

    ticks = itertools.count()  # each is the fastest until now, so the last one: folded
    monkeypatch.setattr(stack.time, "perf_counter", lambda: next(ticks) ** 0.5)
    apart, together = Loop(Changing(), trials(4), CPU), Stack(Changing(), trials(4), CPU)
    for made in (apart, together):
        made.advance(3)
    assert together.folded is False
    together.together = True
    np.testing.assert_allclose(together.evaluate(), apart.evaluate(), rtol=1e-4)
