"""A batch-size schedule as the options of other people's trainers, by their own names.

Checked against Megatron-LM's `StepBatchsizeNumMicroBatchesCalculator`, OLMo-core's `BatchSizeSchedulerCallback` and
torchtitan's `TrainingConfig`; transformers and Lightning have no schedule, and get pybatch's.
"""

from __future__ import annotations

from collections.abc import Callable

from pybatch.base.errors import UsageError, unknown
from pybatch.base.numerals import number
from pybatch.records import Schedule

IN_TOKENS = ("megatron", "olmo")  # whose thresholds are tokens


def staged(found: Schedule, trainer: str, sequence: int | None = None) -> str:
    """The schedule for a trainer of `TRAINERS`.

    Args:
        found: in examples.
        trainer: by name.
        sequence: tokens of an example, for trainers that count in them.

    Raises:
        UsageError: another trainer, or tokens are needed and `sequence` is not given.
    """
    if trainer not in TRAINERS:
        raise unknown("trainer", trainer, TRAINERS)
    if trainer in IN_TOKENS and sequence is None:
        raise UsageError(f"{trainer} counts in tokens. Give those of an example: --sequence-length N.")
    return TRAINERS[trainer](found, sequence or 1)


def _megatron(found: Schedule, sequence: int) -> str:
    thresholds = " ".join(f"{stage.first_example * sequence}:{stage.batch}" for stage in found.stages)
    rates = ", ".join(f"x{number(stage.rate_factor)} at {stage.batch}" for stage in found.stages)
    return (
        f"# It leaves the rate alone. Of the rate of the run at batch {found.base_batch}\n# each needs: {rates}\n"
        f'--step-batch-size-schedule "{thresholds}" --train-samples {found.examples}\n'
    )


def _olmo(found: Schedule, sequence: int) -> str:
    sizes = ", ".join(str(stage.batch * sequence) for stage in found.stages)
    starts = ", ".join(f"Duration.tokens({stage.first_example * sequence})" for stage in found.stages)
    first = number(found.stages[0].rate_factor)
    by = "" if found.rate_rule == "sqrt" else f" This schedule was made for the rule {found.rate_rule!r}."
    return f"""\
# Configure {first} times the rate of the run at batch {found.base_batch}: the callback takes it
# for the first batch, and multiplies it by the square root of the batch ratio
# from there on.{by}
from olmo_core.train import Duration
from olmo_core.train.callbacks import BatchSizeSchedulerCallback

callback = BatchSizeSchedulerCallback(
    batch_sizes=[{sizes}],
    schedule=[{starts}],
)
"""


def _torchtitan(found: Schedule, _: int) -> str:
    """It has one batch size a run: a run for each stage, from the checkpoint of the one before."""
    lines = ["# a run for each stage, from the checkpoint before;", "# rates are times that of the run measured"]
    for stage in found.stages:
        last = stage.first_step + stage.steps - 1
        rate = f"  # rate x{number(stage.rate_factor)}"
        lines.append(f"--training.global_batch_size {stage.batch} --training.steps {last}{rate}")
    return "\n".join(lines) + "\n"


def _stages(found: Schedule) -> str:
    return "[" + ", ".join(f"({stage.first_example}, {stage.batch})" for stage in found.stages) + "]"


def _hf(found: Schedule, _: int) -> str:
    return f"""\
# TrainingArguments: per_device_train_batch_size times the devices divides {found.stages[0].batch},
# gradient_accumulation_steps=1, num_train_epochs = {found.examples} examples
# over those of the data set, rounded up, and a learning-rate schedule of {found.steps} steps.
from pybatch.integrations.transformers import BatchScheduleCallback

trainer.add_callback(
    BatchScheduleCallback(
        {_stages(found)},
        steps={found.steps},
        base_batch={found.base_batch},
        rate="{found.rate_rule}",
    )
)
"""


def _lightning(found: Schedule, _: int) -> str:
    return f"""\
# the loader's batch size times the devices must divide {found.stages[0].batch}; max_steps={found.steps}
from pybatch.integrations.lightning import BatchScheduleCallback

schedule = BatchScheduleCallback(
    {_stages(found)},
    base_batch={found.base_batch},
    rate="{found.rate_rule}",
)
trainer = Trainer(callbacks=[schedule])
"""


TRAINERS: dict[str, Callable[[Schedule, int], str]] = {
    "megatron": _megatron,
    "hf": _hf,
    "lightning": _lightning,
    "torchtitan": _torchtitan,
    "olmo": _olmo,
}
