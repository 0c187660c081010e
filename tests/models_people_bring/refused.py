"""What has no kernel: the error names the true reason.

Axes: n examples.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from nntk_dist.errors import ArgumentError, ModelError, NNTKError
from tests.models_people_bring.case import Case, Given, Refused, numbers, of_module, of_tokens, tokens

BATCH = Refused(ModelError, "the model's output for one example depends on the other examples of its batch")


class AcrossTheBatch(nn.Module):
    """A hidden layer that a function of the whole batch changes."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.readout, self.mix = nn.Linear(3, 4), nn.Linear(4, 2), mix

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(torch.tanh(self.mix(self.first(x))))


def across(mix: Callable[[Tensor], Tensor]) -> Callable[[], Given]:
    return of_module(lambda: AcrossTheBatch(mix), 3)


def with_outlier() -> Given:
    """The largest row comes first, so that a batch without the last row is scaled alike."""
    x = numbers(3)
    x[0] *= 100.0
    return Given(AcrossTheBatch(lambda h: h / h.detach().abs().max()).double(), x)


def random(h: Tensor) -> Tensor:
    return functional.dropout(h, 0.5, training=True)


def frozen() -> nn.Module:
    return nn.Linear(3, 2).requires_grad_(False)


class Returning(nn.Module):
    """What the model returns is no output of examples."""

    def __init__(self, result: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.linear, self.result = nn.Linear(3, 2), result

    def forward(self, x: Tensor) -> object:
        return self.result(self.linear(x))


def returning(result: Callable[[Tensor], object]) -> Callable[[], Given]:
    return of_module(lambda: Returning(result), 3)


CASES = (
    Case("scaled by the batch's largest number", with_outlier, BATCH),
    Case("normalised over the batch", across(lambda h: h - h.mean(0)), BATCH),
    Case("BatchNorm without running statistics",
         of_module(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)), 3), BATCH),
    Case("neighbours in the batch", across(lambda h: h + h.roll(1, 0)), BATCH),
    Case("sorted along the batch", across(lambda h: h.sort(0).values), BATCH),
    Case("scaled by the batch size", across(lambda h: h * len(h)), BATCH),
    Case("attention along the batch",
         of_module(lambda: nn.Sequential(nn.Linear(3, 4), nn.TransformerEncoderLayer(4, 2, 6)), 3), BATCH),
    Case("random in eval mode", across(random), Refused(ModelError, "changes from call to call")),
    Case("no parameters", of_module(nn.Tanh, 3), Refused(ModelError, "the model has no parameters")),
    Case("all parameters frozen", of_module(frozen, 3), Refused(ArgumentError, "parameters that match are frozen")),
    Case("lazy layers that were never called", lambda: Given(nn.LazyLinear(2), numbers(3)),
         Refused(ModelError, "parameter 'weight' has no shape yet")),
    Case("wrong input width", of_module(lambda: nn.Linear(4, 2), 3), Refused(ModelError, "the model fails on its inp")),
    Case("float ids", lambda: Given(nn.Embedding(7, 2), numbers(3)), Refused(ModelError, "the model fails on its inp")),
    Case("ids beyond the table", of_tokens(lambda: nn.Sequential(nn.Embedding(3, 2), nn.Flatten()), 5, 7),
         Refused(ModelError, "the model fails on its inp")),
    Case("whole numbers come out", returning(lambda h: h.argmax(1)), Refused(ModelError, "returned dtype torch.int64")),
    Case("a tuple comes out", returning(lambda h: (h, h)), Refused(ModelError, "the model returned a tuple")),
    Case("None comes out", returning(lambda h: None), Refused(ModelError, "the model returned")),
    Case("one number for the batch", returning(lambda h: h.mean()), Refused(ModelError, "the model returned shape")),
    Case("infinity comes out", returning(lambda h: h / 0.0), Refused(ModelError, "NaN or infinity")),
    Case("not a module", lambda: Given(len, numbers(3)), Refused(ArgumentError, "model is a builtin_function")),
    Case("no examples", lambda: Given(nn.Linear(3, 2), torch.zeros(0, 3)), Refused(NNTKError, "")),
    Case("words as examples", lambda: Given(nn.Linear(3, 2), ["a", "b"]), Refused(NNTKError, "")),
    Case("a part that is missing", lambda: Given(nn.Linear(3, 2), {"y": tokens(2, 3)}), Refused(NNTKError, "")),
)  # fmt: skip
