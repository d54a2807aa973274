"""pybatch's AdamW in the place of torch's: clipping and the gradient noise scale in the pass that updates.

python examples/fused_optimizer.py --steps 300
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

from pybatch.optim import AdamW


def main() -> None:
    """Train with four micro-batches a step, and read the noise scale that came with it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()

    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    # torch's arguments come first and mean the same. Clipping moves into the optimizer: no clip_grad_norm_.
    optimizer = AdamW(
        model.named_parameters(), lr=3e-3, weight_decay=0.01, max_grad_norm=1.0, noise=True, state_dtype="bf16"
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, given.steps)
    for _ in range(given.steps):
        for _ in range(4):
            chosen = torch.randint(len(images), (32,))
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            loss.backward()
            optimizer.accumulate(len(chosen))  # adds to the sum of the step and takes both norms in one read
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    print(f"loss {loss.item():.3f}")
    print(f"noise scale: {optimizer.noise}")
    print(f"states: {optimizer.state_bytes / sum(p.numel() for p in model.parameters()):.3g} bytes a parameter")

    # A state_dict is torch's: its own AdamW goes on from here, in fp32.
    twin = torch.optim.AdamW(model.named_parameters(), lr=3e-3, weight_decay=0.01)
    twin.load_state_dict(optimizer.state_dict())
    print(f"torch's AdamW goes on at step {int(next(iter(twin.state.values()))['step'])}")


if __name__ == "__main__":
    main()
