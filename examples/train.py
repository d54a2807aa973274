"""An ordinary training script, which knows nothing of pybatch: scikit-learn's digits, a small network, AdamW.

python examples/train.py --epochs 30                  # as you train today
pybatch watch examples/train.py --epochs 30           # the same, and then the verdict on its batch size
pybatch watch -o run.json --html page.html examples/train.py --epochs 30
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split


def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """Share of the images whose digit the model names."""
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in loader)
    model.train()
    return right / len(loader.dataset)  # type: ignore[arg-type]


def main() -> None:
    """Train, and print the accuracy after each tenth epoch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    given = parser.parse_args()

    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    train, test = random_split(digits, [1437, 360])
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr)
    loader, held_out = DataLoader(train, given.batch_size, shuffle=True), DataLoader(test, 360)
    for epoch in range(1, given.epochs + 1):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        if epoch % 10 == 0 or epoch == given.epochs:
            print(f"epoch {epoch}: test accuracy {accuracy(model, held_out):.3f}")


if __name__ == "__main__":
    main()
