"""A plan of micro-batches as the options of other people's trainers, by their own names.

Checked against transformers 5.24, accelerate 1.15, Lightning 2.6, DeepSpeed's "Configuration JSON", torchtitan's
`TrainingConfig` and Megatron-LM's training arguments.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from pybatch.base.errors import unknown
from pybatch.records import AccumulationPlan


def snippet(plan: AccumulationPlan, trainer: str) -> str:
    """The options of a plan for a trainer of `TRAINERS`; raises UsageError for another."""
    if trainer not in TRAINERS:
        raise unknown("trainer", trainer, TRAINERS)
    return TRAINERS[trainer](plan)


def _hf(plan: AccumulationPlan) -> str:
    return f"""\
# a process a device: torchrun --nproc-per-node {plan.devices} train.py
from transformers import TrainingArguments

arguments = TrainingArguments(
    per_device_train_batch_size={plan.micro_batch},
    gradient_accumulation_steps={plan.accumulation},
)
"""


def _accelerate(plan: AccumulationPlan) -> str:
    return f"""\
# accelerate launch --num_processes {plan.devices} train.py, with a DataLoader of batch_size={plan.micro_batch}
from accelerate import Accelerator

accelerator = Accelerator(gradient_accumulation_steps={plan.accumulation})
"""


def _lightning(plan: AccumulationPlan) -> str:
    return f"""\
# with a DataLoader of batch_size={plan.micro_batch}
from lightning import Trainer

trainer = Trainer(devices={plan.devices}, accumulate_grad_batches={plan.accumulation})
"""


def _deepspeed(plan: AccumulationPlan) -> str:
    config = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
    }
    return json.dumps(config, indent=2) + "\n"


def _torchtitan(plan: AccumulationPlan) -> str:
    """It derives the accumulation from both and its data-parallel degree, replicate x shard."""
    return f"--training.local_batch_size {plan.micro_batch} --training.global_batch_size {plan.global_batch}\n"


def _megatron(plan: AccumulationPlan) -> str:
    """It derives the accumulation from both and its data-parallel size, world / (tensor x pipeline x context)."""
    return f"--micro-batch-size {plan.micro_batch} --global-batch-size {plan.global_batch}\n"


TRAINERS: dict[str, Callable[[AccumulationPlan], str]] = {
    "hf": _hf,
    "deepspeed": _deepspeed,
    "torchtitan": _torchtitan,
    "lightning": _lightning,
    "megatron": _megatron,
    "accelerate": _accelerate,
}
# What must be as many as the plan has devices, where the options leave it to how the trainer is launched.
LAUNCHED = {
    "deepspeed": "the number of devices it is launched on",
    "torchtitan": "its data-parallel degree (data_parallel_replicate_degree x data_parallel_shard_degree)",
    "megatron": "its data-parallel size (devices over tensor x pipeline x context parallel)",
}
