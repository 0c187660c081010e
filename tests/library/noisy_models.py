"""Small models with noise, correct and wrong ones, that the tests of noise share.

Axes: n examples.
"""

import torch
from torch import Tensor, nn

from nntk_dist import Dropout, StochasticModule

P_DROP = 0.4


class Jitter(StochasticModule):
    """Additive noise as a user would write it: two requests per call, one of each kind."""

    def forward(self, u: Tensor) -> Tensor:
        shape = u.shape[1:]
        return u * (1 + 0.2 * self.normals(shape, like=u)) + self.uniforms(shape, like=u).to(u.dtype)


class ByExample(StochasticModule):
    """Wrong: its noise has the examples' axis."""

    def forward(self, u: Tensor) -> Tensor:
        return u + self.normals(tuple(u.shape), like=u)


class Unseeded(nn.Module):
    def forward(self, u: Tensor) -> Tensor:
        return nn.functional.dropout(u, 0.5, training=True)


class Twice(nn.Module):
    """One noise module behind both layers."""

    def __init__(self, noise: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.last, self.noise = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2), noise

    def forward(self, x: Tensor) -> Tensor:
        h = self.noise(torch.tanh(self.first(x)))
        return self.last(self.noise(torch.tanh(self.second(h))))


def seeded(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.eval()


def network(*noise: nn.Module, activation: nn.Module | None = None) -> nn.Module:
    return seeded(nn.Sequential(nn.Linear(3, 5), activation or nn.Tanh(), *noise, nn.Linear(5, 2)))


X = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
NOISE = {"dropout": Dropout(P_DROP), "jitter": Jitter(), "both": nn.Sequential(Dropout(P_DROP), Jitter())}
