"""A training in Lightning whose memory may "run out"."""

import random

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader


def data(n=512):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(1))
    return list(zip(x, (x[:, 0] > 0).long(), strict=True))


class Module(pl.LightningModule):
    """Memory "runs out" past a batch."""

    ran = []  # noqa: RUF012 - batch sizes of all modules

    def __init__(self, fits=10**9, batch_size=4, examples=512):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 2))
        self.fits, self.batch_size, self.examples = fits, batch_size, examples
        self.seen, self.count, self.held = [], 0, {"ema": torch.zeros(2)}
        self.body[1].eval()

    def training_step(self, batch, i):
        x, y = batch
        self.seen.append(len(x))
        self.ran.append(len(x))
        self.count += random.randrange(1, 9) + np.random.randint(1, 9)
        self.held["ema"] += torch.rand(2)
        if len(x) > self.fits:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        loss = nn.functional.cross_entropy(self.body(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 10)}

    def train_dataloader(self):
        return DataLoader(data(self.examples), batch_size=self.batch_size)


def trainer(tmp_path, callbacks, steps=4, **more):
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False} | more
    return pl.Trainer(
        default_root_dir=tmp_path,
        max_steps=steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **settings,
    )
