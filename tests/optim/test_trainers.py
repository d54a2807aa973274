"""In other people's trainers: the trajectory of torch's own optimizer, the noise of a plain loop, saved and resumed.

What each trainer feeds its model is written down, and a plain loop that scales its loss alike is run on the same
micro-batches.
"""

import copy

import pytest
import torch
from torch import nn

import pybatch.noise
from pybatch.optim import AdamW

ACCUMULATIONS = (1, 2, 4)
STEPS, EXAMPLES, CLIP = 12, 6, 0.5
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("default"),  # trainers warn of each other's packages
]


class Model(nn.Module):
    """As transformers' own: it returns its loss. `seen` holds every micro-batch that it was trained on."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.seen = []

    def forward(self, x, labels):
        logits = self.body(x)
        if self.training:
            self.seen.append((x.detach().clone(), labels.clone()))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def fresh():
    torch.manual_seed(0)
    return Model()


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4 * STEPS * EXAMPLES, 4, generator=generator)
    return [{"x": row, "labels": label} for row, label in zip(x, (x[:, 0] > 0).long() + (x[:, 1] > 1), strict=True)]


def batches():
    return torch.utils.data.DataLoader(data(), batch_size=EXAMPLES)


def by_transformers(optimizer, model, k, tmp_path, callback=None, **more):
    from transformers import Trainer, TrainingArguments

    arguments = {
        "per_device_train_batch_size": EXAMPLES,
        "gradient_accumulation_steps": k,
        "max_steps": STEPS,
        "max_grad_norm": CLIP,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        "lr_scheduler_type": "constant",
    }
    resumed = more.pop("resume_from_checkpoint", None)
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path / "out"), **(arguments | more)),
        train_dataset=data(),
        optimizers=(optimizer, None),
        callbacks=[callback] if callback is not None else [],
    )
    trainer.train(resume_from_checkpoint=resumed)
    return trainer


def attaching():
    """A callback that attaches where the trainer has wrapped the optimizer; `handle` is what it got."""
    from transformers import TrainerCallback

    class Attaching(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **_):
            self.handle = pybatch.noise.attach(model, optimizer)

    return Attaching()


def transformers_run(optimizer, k, tmp_path):
    model, callback = fresh(), attaching()
    by_transformers(optimizer(model), model, k, tmp_path, callback)
    return model, callback.handle.noise


def accelerate_run(optimizer, k, tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=k)
    model = fresh()
    wrapped, own, loader = accelerator.prepare(model, optimizer(model), batches())
    handle = pybatch.noise.attach(wrapped, own)
    for i, batch in enumerate(loader):
        if i == k * STEPS:
            break
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(**batch)["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped.parameters(), CLIP)
            own.step()
            own.zero_grad()
    return model, handle.noise


def lightning_module(optimizer, automatic, k=1):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = fresh()
            self.automatic_optimization = automatic
            self.handle = None

        def configure_optimizers(self):
            return optimizer(self.model)

        def on_train_start(self):
            self.handle = pybatch.noise.attach(self.model, self.optimizers())

        def training_step(self, batch, i):
            loss = self.model(**batch)["loss"]
            if automatic:
                return loss
            self.manual_backward(loss / k)
            if i % k == k - 1:
                own = self.optimizers()
                self.clip_gradients(own, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
                own.step()
                own.zero_grad()
            return None

    return Module()


def lightning_trainer(tmp_path, automatic, k, steps, **more):
    import lightning

    own = {"accumulate_grad_batches": k, "gradient_clip_val": CLIP} if automatic else {}
    return lightning.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"enable_checkpointing": False} | own | more),
    )


def lightning_run(optimizer, k, tmp_path, automatic=True):
    module = lightning_module(optimizer, automatic, k)
    lightning_trainer(tmp_path, automatic, k, STEPS).fit(module, batches())
    return module.model, module.handle.noise


def manual_run(optimizer, k, tmp_path):
    return lightning_run(optimizer, k, tmp_path, automatic=False)


TRAINERS = {
    "transformers": transformers_run,
    "accelerate": accelerate_run,
    "lightning": lightning_run,
    "lightning, manual": manual_run,
}


def plain_loop(seen, k):
    """Torch's optimizer, the loss divided as all of these trainers do."""
    model = fresh()
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS)
    handle = pybatch.noise.attach(model, optimizer)
    for i in range(STEPS):
        for x, labels in seen[i * k : (i + 1) * k]:
            (model(x, labels)["loss"] / k).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return model, handle.noise


def torchs(model):
    return torch.optim.AdamW(model.parameters(), **OPTIONS)


def fused(model):
    return AdamW(model.parameters(), **OPTIONS)


def measuring(model):
    """As a user makes it who takes noise=True for enough."""
    return AdamW(model.parameters(), noise=True, **OPTIONS)


@pytest.mark.parametrize("k", ACCUMULATIONS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_trajectory_is_torchs_and_the_noise_a_plain_loops(trainer, k, tmp_path):
    pytest.importorskip(trainer.partition(",")[0])
    run = TRAINERS[trainer]
    twin, noise = run(torchs, k, tmp_path)
    model, own = run(fused, k, tmp_path)
    assert len(model.seen) == k * STEPS
    assert all(torch.equal(a[0], b[0]) for a, b in zip(model.seen, twin.seen, strict=True))
    moved = max(
        float((p - q).detach().abs().max()) for p, q in zip(model.parameters(), fresh().parameters(), strict=True)
    )
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert float((p - q).detach().abs().max()) <= 1e-6 * max(1.0, moved)
    plain, expected = plain_loop(twin.seen, k)
    for p, q in zip(twin.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert (noise.source, noise.steps) == (expected.source, expected.steps)
    assert (noise.grad_sq, noise.trace) == (expected.grad_sq, expected.trace)  # to the bit
    assert own.steps == expected.steps
    assert own.trace == pytest.approx(expected.trace, rel=1e-5)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_where_nobody_calls_accumulate_hooks_measure_a_fused_optimizer(trainer, tmp_path):
    """All steps but the first, which shows that nobody does."""
    pytest.importorskip(trainer.partition(",")[0])
    _, noise = TRAINERS[trainer](measuring, 2, tmp_path)
    assert (noise.source, noise.steps) == ("micro-batches", STEPS - 1)
    assert noise.trace > 0


def test_transformers_resumes_where_it_was(tmp_path):
    pytest.importorskip("transformers")
    whole = fresh()
    by_transformers(fused(whole), whole, 2, tmp_path, save_strategy="steps", save_steps=STEPS // 2)
    again = fresh()
    half = tmp_path / "out" / f"checkpoint-{STEPS // 2}"
    by_transformers(fused(again), again, 2, tmp_path, resume_from_checkpoint=str(half))
    assert len(again.seen) < len(whole.seen)
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_lightning_resumes_where_it_was(tmp_path):
    """From the checkpoint between two epochs: its own loaders start an epoch anew."""
    pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    epoch = torch.utils.data.DataLoader(data()[: STEPS * EXAMPLES], batch_size=EXAMPLES)
    whole, again = (lightning_module(fused, True) for _ in range(2))
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    lightning_trainer(tmp_path, True, 2, -1, max_epochs=2, enable_checkpointing=True, callbacks=[saving]).fit(
        whole, epoch
    )
    lightning_trainer(tmp_path, True, 2, -1, max_epochs=2).fit(again, epoch, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert (len(whole.model.seen), len(again.model.seen)) == (2 * STEPS, STEPS)
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_transformers_with_accumulate(tmp_path):
    """Its own clipping off, which would look at gradients that are consumed, and its division of the loss undone."""
    pytest.importorskip("transformers")
    from transformers import TrainerCallback

    k = 2
    twin, _ = transformers_run(torchs, k, tmp_path)

    class Undivided(Model):
        def forward(self, x, labels):
            found = super().forward(x, labels)
            return found | {"loss": k * found["loss"]}

    torch.manual_seed(0)
    model = Undivided()
    optimizer = AdamW(model.parameters(), noise=True, max_grad_norm=CLIP, **OPTIONS)

    class Accumulating(TrainerCallback):
        def on_substep_end(self, *_, **__):
            optimizer.accumulate(EXAMPLES)

        def on_pre_optimizer_step(self, *_, **__):
            optimizer.accumulate(EXAMPLES)

    by_transformers(optimizer, model, k, tmp_path, Accumulating(), max_grad_norm=0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    plain = fresh()
    own = AdamW(plain.parameters(), noise=True, max_grad_norm=CLIP, **OPTIONS)
    for i, (x, labels) in enumerate(twin.seen):
        plain(x, labels)["loss"].backward()
        own.accumulate(EXAMPLES)
        if i % k == k - 1:
            own.step()
    assert (optimizer.noise.steps, optimizer.noise.trace) == (STEPS, own.noise.trace)
    assert optimizer.noise.trajectory == own.noise.trajectory


def test_a_trainers_copy_of_the_optimizer_goes_on_alone():
    model = fresh()
    optimizer = fused(model)
    for batch in list(batches())[:3]:
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    copied = copy.deepcopy(optimizer)
    assert copied.state_dict().keys() == optimizer.state_dict().keys()
