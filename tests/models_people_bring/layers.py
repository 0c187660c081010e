"""Layers of every kind, tied and reparametrised ones.

Axes: n examples, t positions.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from tests.models_people_bring.case import Case, Computed, Given, numbers, of_module, of_tokens, tokens


def around(layer: nn.Module, width: int) -> nn.Module:
    """A layer behind a Linear and in front of a tanh and a readout."""
    return nn.Sequential(nn.Linear(3, 4), layer, nn.Flatten(), nn.Tanh(), nn.Linear(width, 2))


def convolutional(layer: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 2), layer, nn.Tanh(), nn.Flatten(), nn.Linear(width, 2))


def trained_batch_norm() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.running_mean, norm.running_var = torch.randn(4), 0.5 + torch.rand(4)
    return convolutional(norm, 16)


class Bag(nn.Module):
    """An embedding, the mean over positions, a readout."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding, self.readout = embedding, nn.Linear(3, 2)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        return self.readout(torch.tanh(h.mean(1) if h.ndim == 3 else h))


class Tied(nn.Module):
    """One weight in two layers, and one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.readout = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.second.weight, self.again = self.first.weight, self.readout

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.readout(h) * self.again(x)


class Listed(nn.Module):
    """Parameters in a list and a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(3, 3), torch.randn(3, 2)])
        self.named = nn.ParameterDict({"shift": torch.randn(2)})

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weights[0]) @ self.weights[1] + self.named["shift"]


class Products(nn.Module):
    """A bilinear layer, and an einsum with a raw parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear, self.core = nn.Bilinear(3, 3, 2), nn.Parameter(torch.randn(2, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x, torch.tanh(x)) + torch.einsum("ni,aib,nb->na", x, self.core, x[:, :2])


class Fourier(nn.Module):
    """Complex weights on frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2, dtype=torch.complex128))
        self.readout = nn.Linear(3, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(torch.tanh(torch.fft.irfft(torch.fft.rfft(x) @ self.weight, n=3)))


def old(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    """Reparametrise in the way that torch has deprecated."""

    def make() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nn.Sequential(wrap(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))

    return make


def inside(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(wrap(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def lazy() -> Given:
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2))
    model(torch.ones(1, 3))
    return Given(model.double(), numbers(3))


def scaled_by_frequency() -> nn.Module:
    torch.manual_seed(0)
    return Bag(nn.Embedding(7, 3)).double()


def short(renormed: nn.Embedding) -> nn.Module:
    """Some rows within the largest norm, as after training."""
    with torch.no_grad():
        renormed.weight.mul_(0.3)
    return Bag(renormed)


CASES = (
    Case("PReLU", of_module(lambda: around(nn.PReLU(), 4), 3)),
    Case("PReLU for each channel", of_module(lambda: convolutional(nn.PReLU(4), 16), 1, 3, 3)),
    Case("RReLU", of_module(lambda: around(nn.RReLU(), 4), 3)),
    Case("Dropout in eval mode", of_module(lambda: around(nn.Dropout(0.5), 4), 3)),
    Case("BatchNorm with running statistics", of_module(trained_batch_norm, 1, 3, 3)),
    Case("GroupNorm", of_module(lambda: convolutional(nn.GroupNorm(2, 4), 16), 1, 3, 3)),
    Case("InstanceNorm", of_module(lambda: convolutional(nn.InstanceNorm2d(4, affine=True), 16), 1, 3, 3)),
    Case("RMSNorm", of_module(lambda: around(nn.RMSNorm(4), 4), 3)),
    Case("ConvTranspose", of_module(lambda: convolutional(nn.ConvTranspose2d(4, 2, 2), 18), 1, 3, 3)),
    Case("circular convolution", of_module(
        lambda: convolutional(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", groups=2), 16), 1, 3, 3)),
    Case("old weight_norm", of_module(old(nn.utils.weight_norm), 3)),
    # far from θ the norm crosses zero, and f has a pole
    Case("old spectral_norm", of_module(old(nn.utils.spectral_norm), 3), Computed(estimator="weight")),
    Case("pruned", of_module(inside(lambda m: prune.l1_unstructured(m, "weight", 0.4)), 3)),
    Case("weight_norm", of_module(inside(parametrizations.weight_norm), 3)),
    Case("spectral_norm", of_module(inside(parametrizations.spectral_norm), 3)),
    # torch rounds the diagonal of its parameter
    Case("orthogonal", of_module(inside(parametrizations.orthogonal), 3), Computed(estimator="activation")),
    Case("Bilinear and einsum", of_module(Products, 3)),
    Case("tied weights", of_module(Tied, 3)),
    Case("ParameterList and ParameterDict", of_module(Listed, 3)),
    Case("complex parameters", lambda: Given(Fourier(), numbers(3))),
    Case("lazy layers after a call", lazy),
    Case("Embedding", of_tokens(lambda: Bag(nn.Embedding(7, 3)), 5, 7)),
    Case("Embedding with max_norm", of_tokens(lambda: short(nn.Embedding(7, 3, max_norm=4.0)), 5, 7)),
    Case("Embedding with sparse gradients", of_tokens(lambda: Bag(nn.Embedding(7, 3, sparse=True)), 5, 7)),
    Case(
        "Embedding with scale_grad_by_freq",
        of_tokens(lambda: Bag(nn.Embedding(7, 3, scale_grad_by_freq=True)), 5, 7),
        Computed(lambda m, i: m(tokens(5, 7)[i : i + 1]), model=scaled_by_frequency),
    ),
    Case("EmbeddingBag", of_tokens(lambda: Bag(nn.EmbeddingBag(7, 3)), 5, 7)),
    Case("EmbeddingBag, sparse", of_tokens(lambda: Bag(nn.EmbeddingBag(7, 3, mode="sum", sparse=True)), 5, 7)),
)  # fmt: skip
