"""Recurrent networks, which torch's vmap cannot take.

Axes: n examples, t steps.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.models_people_bring.case import Case, Computed, Given, N, numbers, of_module, of_tokens


class Recurrent(nn.Module):
    """A recurrent layer and a readout of its last step."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.readout = layer, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.layer(x)
        return self.readout(h[:, -1])


class StepByStep(nn.Module):
    """A cell in a Python loop, whose first state is a factory's tensor without a dtype."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.readout = cell, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        lstm = isinstance(self.cell, nn.LSTMCell)
        zeros = torch.zeros(len(x), 4, dtype=x.dtype)
        state = (zeros, zeros) if lstm else zeros
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.readout(state[0] if lstm else state)


class OfLengths(nn.Module):
    """An LSTM over packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.readout = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        h, _ = pad_packed_sequence(self.layer(packed)[0], batch_first=True)
        return self.readout(h[torch.arange(len(x)), lengths - 1])


class Tagger(nn.Module):
    """Token ids through a bidirectional GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.recurrent = Recurrent(nn.GRU(3, 3, bidirectional=True, batch_first=True), 6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.recurrent(self.embedding(ids))


LENGTHS = torch.tensor([5, 2, 4, 3])


def packed() -> Given:
    return Given(OfLengths().double(), {"x": numbers(5, 3), "lengths": LENGTHS})


def layer(make: type[nn.RNNBase], width: int = 4, **options: object) -> Case:
    words = " ".join([make.__name__, *map(str, options)])
    return Case(words, of_module(lambda: Recurrent(make(3, 4, batch_first=True, **options), width), 5, 3))


CASES = (
    layer(nn.LSTM),
    layer(nn.GRU),
    layer(nn.RNN),
    layer(nn.LSTM, 8, num_layers=2, bidirectional=True),
    layer(nn.LSTM, 2, proj_size=2),
    Case("LSTMCell in a loop", of_module(lambda: StepByStep(nn.LSTMCell(3, 4)), 5, 3)),
    Case("GRUCell in a loop", of_module(lambda: StepByStep(nn.GRUCell(3, 4)), 5, 3)),
    Case("GRU over token ids", of_tokens(Tagger, 5, 7)),
    Case("LSTM over packed sequences", packed, Computed(lambda m, i: m(numbers(5, 3)[i : i + 1], LENGTHS[i : i + 1]))),
)
assert len(LENGTHS) == N
