"""The real Trainer: the noise scale in its logs, the trainer as a workload, the plans' options; and accelerate."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

import pybatch.noise
from pybatch.base.errors import UsageError
from pybatch.records import AccumulationPlan
from pybatch.report.snippets import snippet
from pybatch.workloads.running.session import Session

pytestmark = [
    pytest.mark.skipif(find_spec("transformers") is None, reason="no transformers"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("default"),  # trainers warn of each other's packages
]
CPU = torch.device("cpu")
EXAMPLES, STEPS = 4, 6
PLAN = AccumulationPlan(global_batch=96, devices=1, micro_batch=16, accumulation=6, step_s=None)


class Model(nn.Module):
    """As transformers' own: it returns its loss."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x, labels):
        logits = self.body(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def fresh():
    torch.manual_seed(0)
    return Model()


def data(n=64):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(1))
    return [{"x": row, "labels": label} for row, label in zip(x, (x[:, 0] > 0).long(), strict=True)]


def trainer(tmp_path, callbacks=(), **more):
    from transformers import Trainer, TrainingArguments

    arguments = {
        "per_device_train_batch_size": EXAMPLES,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "dataloader_pin_memory": False,
    }
    return Trainer(
        fresh(),
        TrainingArguments(str(tmp_path / "out"), **(arguments | more)),
        train_dataset=data(),
        callbacks=list(callbacks),
    )


def test_the_callback_logs_wherever_the_trainer_logs(tmp_path):
    from transformers import TrainerCallback

    from pybatch.integrations.transformers import NoiseScaleCallback

    told = []

    class Reporter(TrainerCallback):
        """As those of TensorBoard and W&B: made before ours, and handed what is logged."""

        def on_log(self, args, state, control, logs=None, **_):
            told.append(dict(logs))

    class Attached(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **_):
            self.handle = pybatch.noise.attach(model, optimizer)

    ours, theirs = NoiseScaleCallback(), Attached()
    with pytest.raises(UsageError, match="has not begun"):
        _ = ours.noise
    made = trainer(tmp_path, [Reporter(), ours, theirs])
    made.train()
    found = ours.noise
    assert (found.source, found.steps) == ("micro-batches", STEPS)
    assert (found.trace, found.grad_sq) == (theirs.handle.noise.trace, theirs.handle.noise.grad_sq)
    logs = [log for log in told if "loss" in log]
    assert len(logs) == STEPS // 2
    assert all("noise/trace" in log for log in logs[1:])
    assert told[-1]["noise/trace"] == found.trace
    history = [log for log in made.state.log_history if "loss" in log]
    assert [log.get("noise/trace") for log in history] == [log.get("noise/trace") for log in logs]


def test_a_trainer_as_a_workload(tmp_path):
    from pybatch.integrations.transformers import workload

    made = trainer(tmp_path, lr_scheduler_type="linear", warmup_steps=2)
    work = workload(made, name="mine")
    nn.init.zeros_(made.model.body[0].weight)  # it is trained after
    session = Session(work, CPU)
    info = session.info
    assert (info.name, info.examples, info.reference_batch) == ("mine", 64, 2 * EXAMPLES)
    assert (info.optimizer, info.learning_rate) == ("adamw", 0.01)
    batch = session.batch(16)
    assert torch.equal(session.loss(batch), fresh()(**batch)["loss"])
    theirs = made.create_optimizer()
    ours = session.optimizer()
    names = [n for n, _ in session.model.named_parameters()]
    places = {id(p): n for n, p in session.model.named_parameters()}
    known = {id(p): n for n, p in made.model.named_parameters()}
    assert len(names) == len(places)
    for own, group in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert [places[id(p)] for p in own["params"]] == [known[id(p)] for p in group["params"]]
        assert (own["weight_decay"], own["lr"]) == (group["weight_decay"], group["lr"])
    schedule = session.schedule(ours, 10)
    rates = []
    for _ in range(4):
        rates.append(ours.param_groups[0]["lr"])
        ours.step()
        schedule.step()
    assert rates == pytest.approx([0.0, 0.005, 0.01, 0.00875])
    assert work.loader(8, 0).batch_size == 8
    assert made.lr_scheduler is None


def test_tokens_count_where_the_loss_is_a_mean_over_them(tmp_path):
    from pybatch.integrations.transformers import workload

    made = trainer(tmp_path)
    made.train_dataset = [
        {"x": torch.zeros(4), "labels": torch.tensor([1] * n + [-100] * (6 - n))} for n in (6, 3) for _ in range(8)
    ]
    _, weights = Session(workload(made), CPU).weighed_batch(8)
    assert set(weights.tolist()) <= {5.0, 2.0}


def test_the_plans_options_are_the_trainers_own(tmp_path, monkeypatch):
    made = {}
    exec(snippet(PLAN, "hf"), made)
    assert made["arguments"].per_device_train_batch_size == 16
    assert made["arguments"].gradient_accumulation_steps == 6
    made = {}
    exec(snippet(PLAN, "accelerate"), made)
    assert made["accelerator"].gradient_accumulation_steps == 6


def test_accelerate(tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from pybatch.integrations.accelerate import NoiseLog, workload

    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.SGD(
        [{"params": (model := fresh()).body[0].parameters(), "momentum": 0.5}, {"params": model.body[3].parameters()}],
        lr=0.1,
    )
    loader = torch.utils.data.DataLoader(data(), batch_size=EXAMPLES)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    logged = []
    accelerator.log = lambda values, step: logged.append((step, values))
    log, step = NoiseLog(accelerator, model, optimizer, every=4), 0
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step += 1
            log.step(step)
    assert [at for at, _ in logged] == [4, 8]
    assert logged[-1][1]["noise/trace"] == log.noise.trace
    assert log.noise.source == "micro-batches"
    log.end()
    optimizer.param_groups[0]["lr"] = rate = torch.tensor(0.1)
    work = workload(accelerator, model, optimizer, loader, lambda m, b: m(**b)["loss"])
    before = model.body[0].weight.detach().clone()
    nn.init.zeros_(model.body[0].weight)  # it is trained after, at other rates
    rate.fill_(0.7)
    session = Session(work, CPU)
    assert torch.equal(session.model.body[0].weight, before)
    assert session.info.reference_batch == 2 * EXAMPLES
    again = session.optimizer()
    assert [(float(g["lr"]), g["momentum"], len(g["params"])) for g in again.param_groups] == [
        (pytest.approx(0.1), 0.5, 2),
        (0.1, 0, 2),
    ]
    with pytest.raises(UsageError, match="every 0"):
        NoiseLog(accelerator, model, optimizer, every=0)


STAGES = [(0, 8), (24, 16), (96, 32)]


def staged(tmp_path, callback, **more):
    usual = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 1, "max_steps": -1}
    return trainer(tmp_path, [callback], **(usual | more))


def test_a_batch_schedule_switches_at_its_examples(tmp_path):
    """Of 64 examples an epoch, in passes of 4: 8 to 24 examples, then 16, then 32; and on from a checkpoint."""
    from pybatch.integrations.transformers import BatchScheduleCallback

    seen = []
    callback = BatchScheduleCallback(STAGES, steps=9, rate="linear")
    tried = staged(tmp_path, callback, num_train_epochs=2, save_strategy="steps", save_steps=5)
    plain = tried.training_step
    tried.training_step = lambda *args, **more: (seen.append(callback.schedule.batch), plain(*args, **more))[1]
    tried.train()
    # 24 examples are 6 passes: steps of 4 begin at the 8th; 96 are 24 passes, 8 of them of the second epoch.
    assert seen == [8] * 8 + [16] * 16 + [32] * 8
    logged = [log["batch_size"] for log in tried.state.log_history if "batch_size" in log]
    assert logged == [8, 8, 8, 16, 16, 16, 16, 32, 32]
    assert callback.schedule.examples == 4 * len(seen)
    assert tried.args.gradient_accumulation_steps == 1
    checkpoint = tmp_path / "out" / "checkpoint-5"
    with pytest.raises(UsageError, match="ignore_data_skip"):
        staged(tmp_path, BatchScheduleCallback(STAGES, steps=9), num_train_epochs=2).train(str(checkpoint))
    again = BatchScheduleCallback(STAGES, steps=9, rate="linear", resume=checkpoint)
    staged(tmp_path, again, num_train_epochs=4, ignore_data_skip=True).train(str(checkpoint))
    assert again.schedule.steps == 9
    assert again.schedule.examples == 48 + 16 * 3 + 16  # the epoch begins anew: 48 are 12 passes, 96 the 8th of it


def test_a_step_that_waits_for_its_epoch_is_not_put_off_for_good(tmp_path):
    """Epochs of three passes never divide into steps of two but at their beginning."""
    from pybatch.integrations.transformers import BatchScheduleCallback

    callback = BatchScheduleCallback([(0, 4), (8, 8)], steps=8)
    tried = staged(tmp_path, callback, num_train_epochs=6)
    tried.train_dataset = data(12)
    tried.train()
    assert [log["batch_size"] for log in tried.state.log_history if "batch_size" in log][2:] == [8] * 6
    assert tried.state.global_step == 8


@pytest.mark.parametrize(
    ("examples", "stages", "more", "says"),
    [
        (64, [(0, 16)], {"max_steps": 100}, r"steps take 400 passes, and the Trainer plans .* num_train_epochs=25"),
        (64, [(0, 8)], {"gradient_accumulation_steps": 2}, "plans its epochs by it"),
        (66, [(0, 8)], {"num_train_epochs": 1}, "dataloader_drop_last=True"),
        (12, [(0, 16)], {"max_steps": 2}, "a step of 4 passes is longer than an epoch of 3"),
    ],
)
def test_a_training_that_would_end_early_is_refused(tmp_path, examples, stages, more, says):
    from pybatch.integrations.transformers import BatchScheduleCallback

    tried = staged(tmp_path, BatchScheduleCallback(stages), **more)
    tried.train_dataset = data(examples)
    with pytest.raises(UsageError, match=says):
        tried.train()
