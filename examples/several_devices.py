"""The noise scale under DDP and FSDP2: each process's gradient against the mean of all, which they exchange anyway.

torchrun --nproc-per-node 2 examples/several_devices.py            # DDP; on GPUs where there are any
torchrun --nproc-per-node 2 examples/several_devices.py --fsdp     # FSDP2
"""

import argparse
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import pybatch.noise
from pybatch.optim import AdamW


def main() -> None:
    """Train on all processes, and print the noise scale from the first."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--fsdp", action="store_true")
    given = parser.parse_args()

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    dist.init_process_group("nccl" if gpu else "gloo")
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    model: nn.Module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    model = fully_shard(model) if given.fsdp else DistributedDataParallel(model)
    optimizer = AdamW(model.parameters(), lr=3e-3, max_grad_norm=1.0)  # the norm counts over all shards
    handle = pybatch.noise.attach(model, optimizer)  # after wrapping

    torch.manual_seed(1 + dist.get_rank())  # each process draws its own examples
    for _ in range(given.steps):
        chosen = torch.randint(len(images), (32,))
        loss = nn.functional.cross_entropy(model(images[chosen].to(device)), labels[chosen].to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    noise = handle.noise
    if dist.get_rank() == 0:
        print(f"{noise.source}: {noise}")
    handle.detach()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
