"""A workload of one's own with sequences of unequal length: a loss over all tokens, so that examples count by theirs.

python examples/padded_language_model.py
pybatch bench --workload examples/padded_language_model.py:Sentences --time-budget 60
"""

import sys
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import nn

import pybatch

PAD, LONGEST = 0, 96


class Sentences(pybatch.Workload):
    """Predict the next byte of a sentence of CPython's language reference; shorter ones are padded."""

    name, unit = "sentences", "sentences"
    learning_rate, reference_batch = 3e-3, 16

    def __init__(self) -> None:
        text = " ".join(" ".join(topics.values()).split())
        self.sentences = [s.encode()[:LONGEST] for s in text.split(". ") if len(s) > 8]
        self.examples = len(self.sentences)

    def model(self) -> nn.Module:
        """Bytes [n, length] to logits [n, length, 256]."""
        return nn.Sequential(nn.Embedding(256, 32, padding_idx=PAD), nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 256))

    def batch(self, n: int, generator: torch.Generator, split: str = "train") -> dict[str, torch.Tensor]:
        """n sentences with replacement, all padded to one length: a batch of any size has the same shape."""
        chosen = torch.randint(len(self.sentences), (n,), generator=generator)
        tokens = torch.full((n, LONGEST), PAD)
        for row, i in zip(tokens, chosen.tolist(), strict=True):
            row[: len(self.sentences[i])] = torch.frombuffer(bytearray(self.sentences[i]), dtype=torch.uint8)
        labels = tokens[:, 1:]
        return {"tokens": tokens[:, :-1], "labels": torch.where(labels == PAD, -100, labels)}

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Mean over the tokens of the batch; -100 is left out."""
        return nn.functional.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())

    def example_weights(self, batch: Any) -> torch.Tensor:
        """Tokens of each sentence, [n]: what its gradient counts for."""
        return (batch["labels"] != -100).sum(1)


if __name__ == "__main__":
    found = pybatch.measure_noise(Sentences(), time_budget=float(sys.argv[1]) if sys.argv[1:] else 10.0)
    print(found)
    if found.counted is not None and found.counted.b_simple is not None:
        of = found.counted
        print(f"or {of.b_simple:.0f} {of.unit}, {of.per_example:.1f} of them a sentence")
