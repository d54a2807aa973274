"""Language modelling, byte by byte, on prose that comes with Python or on a text file of the user's."""

from __future__ import annotations

import pkgutil
import sys
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from pybatch.errors import UsageError, unknown
from pybatch.workloads.base import Split, Workload, register

LENGTH = 64  # bytes predicted per sequence
_BYTES = 256
_WIDTH = 64
_LEAST = 100 * (LENGTH + 1)  # bytes; the test tenth must hold some sequences


@register
class Text(Workload):
    """Predict the next byte. One example is a sequence of 64 predictions from a random place of the text.

    Text: the language reference in CPython's `pydoc_data.topics` (about 0.5 MB), or, where a distribution strips it,
    the standard library's docstrings; or any UTF-8 file (`data`). The first nine tenths train, the last tests.
    Models: "transformer" (2 layers of width 64, 4 heads; the default) and "lstm" (2 layers of width 64).
    """

    name = "text"
    unit = "sequences"
    target: dict[str, float] = {"train": 2.0, "test": 2.1}  # noqa: RUF012
    learning_rate = 3e-3
    reference_batch = 32
    models: ClassVar[tuple[str, ...]] = ("transformer", "lstm")

    def __init__(self, model: str | None = None, data: str | None = None) -> None:
        self.model_name = model or self.models[0]
        if self.model_name not in self.models:
            raise unknown("workload 'text': model", self.model_name, self.models)
        self.data = data
        self.examples = len(_splits(data)["train"]) // LENGTH

    def model(self) -> nn.Module:
        """A fresh model: bytes [n, 64] to logits [n, 64, 256]."""
        return Transformer() if self.model_name == "transformer" else Lstm()

    def batch(self, n: int, generator: torch.Generator, split: Split = "train") -> tuple[torch.Tensor, torch.Tensor]:
        """Bytes [n, 64] and the bytes that follow them [n, 64]."""
        text = _splits(self.data)[split]
        starts = torch.randint(len(text) - LENGTH, (n, 1), generator=generator)
        window = text[starts + torch.arange(LENGTH + 1)].long()
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy per byte, nats."""
        inputs, following = batch
        return nn.functional.cross_entropy(model(inputs).flatten(0, 1), following.flatten())


class Transformer(nn.Module):
    """Pre-norm decoder with causal attention and learned positions."""

    def __init__(self, width: int = _WIDTH, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(_BYTES, width)
        self.positions = nn.Embedding(LENGTH, width)
        nn.init.normal_(self.tokens.weight, std=0.1)
        nn.init.normal_(self.positions.weight, std=0.1)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, _BYTES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Bytes [n, t] to logits [n, t, 256]."""
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


class Block(nn.Module):
    """Attention and a two-layer network, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, t, width] to the same."""
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, width))
        y: torch.Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return y


class Lstm(nn.Module):
    """Two recurrent layers between an embedding and a linear read-out."""

    def __init__(self, width: int = _WIDTH, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(_BYTES, width)
        self.recurrent = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, _BYTES)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Bytes [n, t] to logits [n, t, 256]."""
        hidden, _ = self.recurrent(self.tokens(inputs))
        logits: torch.Tensor = self.head(hidden)
        return logits


@lru_cache(4)
def _splits(data: str | None) -> dict[str, torch.Tensor]:
    text = python_prose() if data is None else _read(data)
    every = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())
    cut = len(every) * 9 // 10
    return {"train": every[:cut], "test": every[cut:]}


def _read(data: str) -> bytes:
    try:
        text = Path(data).read_bytes()
    except OSError as error:
        raise UsageError(f"data '{data}' cannot be read: {error.strerror}. Give a text file.") from None
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"data '{data}' is not UTF-8 text: byte {error.start} is 0x{text[error.start]:02x}.") from None
    if len(text) < _LEAST:
        raise UsageError(f"data '{data}' has {len(text)} bytes; language modelling needs at least {_LEAST}.")
    return text


def python_prose() -> bytes:
    """English prose of the running Python: its language reference, else the docstrings in its standard library."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return library_docstrings()
    keys = sorted(topics)
    order = np.random.default_rng(0).permutation(len(keys))  # by name, related topics would fill the test tenth
    return "\n\n".join(topics[keys[i]] for i in order).encode()


def library_docstrings() -> bytes:
    """Docstrings of the standard library's top-level modules, read from their sources without running them."""
    import ast
    import sysconfig

    found = []
    for module in pkgutil.iter_modules([sysconfig.get_path("stdlib")]):
        path = Path(sysconfig.get_path("stdlib")) / f"{module.name}.py"
        if module.name not in sys.stdlib_module_names or not path.is_file():
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.append(ast.get_docstring(node) or "")
    text = "\n\n".join(filter(None, found)).encode()
    if len(text) < _LEAST:
        raise UsageError("workload 'text': this Python has neither pydoc_data.topics nor sources. Give a file as data.")
    return text
