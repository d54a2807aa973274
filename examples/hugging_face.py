"""A Hugging Face recipe: GPT-2's architecture from its configuration, transformers' Trainer, pybatch's optimizer.

pip install transformers accelerate
python examples/hugging_face.py --steps 60
pybatch watch examples/hugging_face.py --steps 60
"""

import argparse
from pydoc_data.topics import topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from pybatch.integrations.transformers import NoiseScaleCallback
from pybatch.optim import AdamW

LENGTH = 64


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
    callback = NoiseScaleCallback()  # in every log of the Trainer, wherever it logs; here its last word is printed
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None), callbacks=[callback])
    trainer.train()
    print(f"noise scale: {callback.noise}")


if __name__ == "__main__":
    main()
