"""A first tensor that is square: which of its dimensions is the batch is told by passes at another size."""

import pytest
import torch
from torch import nn

from pybatch.watch.batching import find_batching
from pybatch.watch.dimensions import agreed, settled
from pybatch.watch.passes import Pass

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 6


class Words(nn.Module):
    """As word_language_model: tokens [length, batch], and a hidden state that is handed on."""

    def __init__(self, batch_first=False, transposed=False):
        super().__init__()
        self.embedding, self.transposed = nn.Embedding(9, 4), transposed
        self.recurrent = nn.LSTM(4, 5, 2, batch_first=batch_first)
        self.head = nn.Linear(5, 9)

    def forward(self, tokens, hidden=None):
        tokens = tokens.t() if self.transposed else tokens
        out, hidden = self.recurrent(self.embedding(tokens), hidden)
        return self.head(out)


class Attending(nn.Module):
    """Attention over [length, batch]: it takes either dimension, and only its layer knows which is which."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), 1, enable_nested_tensor=False
        )

    def forward(self, tokens):
        return self.layers(self.embedding(tokens))


class Features(nn.Module):
    """A square of examples and features: the weights have the number of features."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(SIZE, 3)

    def forward(self, x):
        return self.layer(x)


class Counts(nn.Module):
    """Sums over the features: it takes any, and its output follows the examples alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x.sum(0)[:, None] * self.weight


TOKENS = torch.zeros(SIZE, SIZE, dtype=torch.long)
STATE = (torch.zeros(2, SIZE, 5), torch.zeros(2, SIZE, 5))
CASES = {
    "length first, with its state": (Words(), (TOKENS, STATE), 1),
    "length first": (Words(), (TOKENS,), 1),
    "batch first": (Words(batch_first=True), (TOKENS,), 0),
    "batch first outside": (Words(transposed=True), (TOKENS,), 0),
    "attention": (Attending(), (TOKENS,), 1),
    "features": (Features(), (torch.zeros(SIZE, SIZE),), 0),
    "an output that does not follow": (Counts(), (torch.zeros(SIZE, SIZE),), 1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("hinted", [False, True])
def test_the_batch_of_a_square(case, hinted):
    """Whatever it was taken for at first: layers with the batch second are met before in some runs alone."""
    model, args, dim = CASES[case]
    arguments = (args, {})
    kept = Pass.begun(model, arguments, find_batching(arguments, [SIZE] if hinted else []))
    outputs = model(*args)
    kept.outputs = 1
    kept.keep(0, torch.ones_like(outputs))
    found = settled(kept)
    assert (found.size, found.first) == (SIZE, dim)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_where_nothing_is_square_no_pass_is_run():
    model = Features()
    arguments = ((torch.zeros(4, SIZE),), {})
    kept = Pass.begun(model, arguments, find_batching(arguments))
    assert settled(kept) is kept.batching  # a pass would fail: no gradient was kept


class Others:
    """Processes that run a pass together, each with what it has."""

    def __init__(self, *others):
        self.others = list(others)

    def all(self, one):
        return [one, *self.others]


def kept_of(model, tokens):
    arguments = ((tokens,), {})
    kept = Pass.begun(model, arguments, find_batching(arguments, [SIZE]))
    outputs = model(tokens)
    kept.outputs = 1
    kept.keep(0, torch.ones_like(outputs))
    return kept


class Either(nn.Module):
    """It takes either dimension, and no layer tells."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)

    def forward(self, tokens):
        return self.embedding(tokens)


@pytest.mark.parametrize(
    ("others", "dim"),
    [
        ([(False, (1,))], 1),  # whose sequences are longer: it knows
        ([(True, (1,)), (False, (1,))], 1),
        ([(True, (1,))], 0),  # all alike: as the first one
        ([(False, (1, 1))], 0),  # other arguments
        ([], 0),
    ],
)
def test_a_process_without_a_square_tells_the_others(others, dim):
    found = agreed(kept_of(Either(), TOKENS), Others(*others))
    assert (found.size, found.dims) == (SIZE, (dim,))


def test_what_passes_tell_holds_in_several_processes_too():
    kept = kept_of(Words(), TOKENS)
    assert kept.batching.first == 0
    assert agreed(kept, Others((True, (0,)))).first == 1
    longer = kept_of(Either(), torch.zeros(SIZE + 2, SIZE, dtype=torch.long))
    assert agreed(longer, Others((True, (0,)))).dims == (1,)
