"""A Hugging Face recipe: GPT-2's architecture from its configuration, transformers' Trainer, pybatch's optimizer.

pip install transformers accelerate
python examples/hugging_face.py --steps 60
pybatch watch examples/hugging_face.py --steps 60
"""

import argparse
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import pybatch.noise
from pybatch.optim import AdamW

LENGTH = 64


class NoiseScale(TrainerCallback):
    """Measures along the training; the Trainer has wrapped model and optimizer when it begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any):
        self.handle = pybatch.noise.attach(model, optimizer)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any):
        print(f"noise scale: {self.handle.noise}")
        self.handle.detach()


def main() -> None:
    """Train a small GPT-2 on bytes of CPython's language reference."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()

    torch.manual_seed(0)
    text = torch.tensor(list("".join(topics.values()).encode()))
    rows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    data = [{"input_ids": row, "labels": row} for row in rows]
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4))
    optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    arguments = TrainingArguments(
        output_dir="out",
        max_steps=given.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        report_to=[],
        save_strategy="no",
    )
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None), callbacks=[NoiseScale()])
    trainer.train()


if __name__ == "__main__":
    main()
