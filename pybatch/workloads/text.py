"""Language modelling, byte by byte, on prose that comes with Python or on text of the user's."""

from __future__ import annotations

import pkgutil
import sys
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from pybatch.base.errors import UsageError, unknown
from pybatch.workloads import files
from pybatch.workloads.base import Split, Workload, check_dial, chosen_model, register

_BYTES = 256
_GPT2_VOCABULARY = 50_304  # GPT-2's 50 257 tokens, padded to a multiple of 64: an odd width halves a GPU's matrix rate
# Width, layers and heads. "base" has the shape of GPT-2's smallest (Radford et al. 2019), 124M with its vocabulary.
TRANSFORMERS = {"tiny": (32, 1, 4), "small": (384, 6, 6), "base": (768, 12, 12)}
LSTMS = {"tiny": (32, 1), "small": (512, 2), "base": (1536, 3)}  # width, layers
RATES = {"transformer": 0.01, "lstm": 0.03}  # of the tiny ones; sweeps tune 0.03 for the LSTM at batch 8, 0.06 at 128
_LEAST = 100  # sequences; the test tenth must hold some


@register
class Text(Workload):
    """Predict the next byte. One example is a sequence of 16 predictions from a random place of the text.

    Text: the language reference in CPython's `pydoc_data.topics` (about 0.5 MB), or, where a distribution strips it,
    the standard library's docstrings; or any UTF-8 file (`data`). The first nine tenths train, the last tests.
    Models: "transformer" (a layer of width 32, 4 heads; the default) and "lstm" (a layer of width 32), or larger. As
    they ship, AdamW takes both to the target in some hundreds of steps at batch 8, and in a fifth of them at batch 128.
    --size base is GPT-2 124M: its 12 layers, 1024 positions and vocabulary, of which bytes use the first 256 tokens.
    """

    name = "text"
    unit = "sequences"
    weight_unit = "bytes"
    target: dict[str, float] = {"train": 2.45, "test": 2.6}  # noqa: RUF012
    learning_rate = 3e-3
    reference_batch = 32
    swept_by = "adamw"
    models: ClassVar[tuple[str, ...]] = ("transformer", "lstm")
    dials: ClassVar[dict[str, str]] = {
        "size": "of the model: tiny, small, base (tiny); tiny is one layer 32 wide, base is GPT-2's smallest",
        "length": "bytes predicted per sequence (16)",
        "vocabulary": "rows of the embedding (256); more than 256 are shared with the read-out, as in GPT-2",
        "subset": "share of the training text used, above 0 to 1 (1)",
    }
    sizes: ClassVar[dict[str, dict[str, int | str]]] = {
        "tiny": {},
        "base": {"size": "base", "length": 1024, "vocabulary": _GPT2_VOCABULARY},
    }

    def __init__(
        self,
        model: str | None = None,
        data: str | None = None,
        *,
        size: str = "tiny",
        length: int = 16,
        vocabulary: int = _BYTES,
        subset: float = 1.0,
    ) -> None:
        self.model_name = chosen_model(self.name, model, self.models)
        if size not in TRANSFORMERS:
            raise unknown(f"workload {self.name!r}: size", size, TRANSFORMERS)
        check_dial(self.name, "length", length, 2, 65_536, "2 to 65536 bytes")
        check_dial(self.name, "vocabulary", vocabulary, _BYTES, 1_000_000, f"{_BYTES} to 1000000")
        check_dial(self.name, "subset", subset, 1e-9, 1.0, "a share above 0, at most 1")
        self.data, self.size, self.length, self.vocabulary = data, size, length, vocabulary
        if size == "tiny":
            self.learning_rate = RATES[self.model_name]
        if size == "base":
            self.learning_rate = 6e-4  # GPT-3's table for this size (Brown et al. 2020)
        train, test = _splits(data)
        train = train[: round(subset * len(train))]
        self.text = {"train": train, "test": test}
        for split, part in self.text.items():
            if len(part) < _LEAST * (length + 1) * (1 if split == "train" else 0.1):
                raise UsageError(
                    f"data '{data or 'pydoc_data.topics'}' has {len(part)} bytes to {split}; sequences of {length} "
                    f"need ten times as many. Give more text, or a smaller length."
                )
        self.examples = len(train) // length
        self.evaluation_examples = max(8, 2048 // length)  # a loss per byte then is known within 3 %
        self.options = {"size": size, "length": length, "vocabulary": vocabulary, "subset": subset}

    def model(self) -> nn.Module:
        """A fresh model: bytes [n, length] to logits [n, length, vocabulary]."""
        if self.model_name == "lstm":
            return Lstm(*LSTMS[self.size], vocabulary=self.vocabulary)
        return Transformer(*TRANSFORMERS[self.size], length=self.length, vocabulary=self.vocabulary)

    def batch(self, n: int, generator: torch.Generator, split: Split = "train") -> tuple[torch.Tensor, torch.Tensor]:
        """Bytes [n, length] and the bytes that follow them [n, length]."""
        text = self.text[split]
        starts = torch.randint(len(text) - self.length, (n, 1), generator=generator)
        window = text[starts + torch.arange(self.length + 1)].long()
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy per byte, nats."""
        inputs, following = batch
        return nn.functional.cross_entropy(model(inputs).flatten(0, 1), following.flatten())

    def example_weights(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Bytes predicted per sequence: the same for all."""
        inputs, _ = batch
        return torch.full((len(inputs),), float(inputs.shape[1]), dtype=torch.float64)


class Transformer(nn.Module):
    """Pre-norm decoder with causal attention and learned positions."""

    def __init__(self, width: int, layers: int, heads: int, *, length: int, vocabulary: int = _BYTES) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        nn.init.normal_(self.tokens.weight, std=0.1)
        nn.init.normal_(self.positions.weight, std=0.1)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = _readout(self.tokens)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Bytes [n, t] to logits [n, t, vocabulary]."""
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

    def __init__(self, width: int, layers: int, *, vocabulary: int = _BYTES) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.recurrent = nn.LSTM(width, width, layers, batch_first=True)
        self.head = _readout(self.tokens)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Bytes [n, t] to logits [n, t, vocabulary]."""
        hidden, _ = self.recurrent(self.tokens(inputs))
        logits: torch.Tensor = self.head(hidden)
        return logits


def _readout(tokens: nn.Embedding) -> nn.Linear:
    """Hidden states to logits: weights of its own for bytes, those of a larger embedding (Press and Wolf 2017)."""
    if tokens.num_embeddings == _BYTES:
        return nn.Linear(tokens.embedding_dim, _BYTES)
    head = nn.Linear(tokens.embedding_dim, tokens.num_embeddings, bias=False)
    nn.init.normal_(tokens.weight, std=0.02)  # GPT-2's: at 0.1 the first logits would be far from equal
    head.weight = tokens.weight
    return head


def _splits(data: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and test text as bytes."""
    text = python_prose() if data is None else read_text(data)
    every = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())
    cut = len(every) * 9 // 10
    return every[:cut], every[cut:]


def read_text(data: str) -> bytes:
    """A UTF-8 file, or all files ending in .txt below a folder, in the order of their paths."""
    place = Path(data)
    paths = sorted(place.rglob("*.txt")) if place.is_dir() else [place]
    if not paths:
        raise UsageError(f"data '{data}' has no file ending in .txt. Give a text file, or a folder of such files.")
    parts = []
    for path in paths:
        text = files.read(path)
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            wrong = f"byte {error.start} is 0x{text[error.start]:02x}"
            raise UsageError(f"data '{path}' is not UTF-8 text: {wrong}. Convert it, or leave it out.") from None
        parts.append(text)
    return b"\n\n".join(parts)


@lru_cache(1)
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
    if not text:
        raise UsageError("workload 'text': this Python has neither pydoc_data.topics nor sources. Give a file as data.")
    return text
