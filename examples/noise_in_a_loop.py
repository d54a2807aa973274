"""The gradient noise scale of a loop that stays as it is: any optimizer of torch, one batch a step.

python examples/noise_in_a_loop.py --steps 400 --output noise.jsonl
pybatch report noise.jsonl -o noise.html
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import pybatch.noise


def main() -> None:
    """Train, keep the noise scale along the way, and print it at the end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", default="noise.jsonl")
    given = parser.parse_args()

    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    # With one backward pass a step there are no micro-batches to compare: exact norms of every tenth step's examples.
    handle = pybatch.noise.attach(model, optimizer, source="per-example")
    trajectory = pybatch.noise.Trajectory(handle, given.output)
    for step in range(given.steps):
        chosen = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        loss.backward()
        optimizer.step()
        trajectory.update(step, loss)

    print(f"all:  {handle.noise}")  # of the newest steps that give an interval
    for point in trajectory.record.points:
        value = "unresolved" if point.b_simple is None else f"{point.b_simple:.0f}"
        print(f"steps {point.first_step} to {point.last_step}: {value}, loss {point.loss:.3f}")
    handle.detach()


if __name__ == "__main__":
    main()
