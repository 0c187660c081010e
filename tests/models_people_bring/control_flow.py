"""What a forward pass may do besides calling layers: route, recompute, write in place, leave the graph.

Axes: n examples, t positions.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from nntk_dist.errors import NNTKError
from tests.models_people_bring.case import Case, Computed, Given, Refused, numbers, of_module, of_tokens


class Routed(nn.Module):
    """A mixture of experts, each of which gets the rows that a boolean mask selects."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(3, 2)
        self.experts = nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 4)])
        self.readout = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.softmax(self.gate(x), 1)
        chosen = (x[:, 0] > 0).long()
        h = torch.zeros(len(x), 4, dtype=x.dtype)
        for number, expert in enumerate(self.experts):
            mask = chosen == number
            h[mask] = torch.tanh(expert(x[mask])) * scores[mask, number, None]
        return self.readout(h)


class RoutedTokens(nn.Module):
    """Experts on positions, gathered and added back."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.readout = nn.Embedding(7, 3), nn.Linear(3, 2)
        self.experts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids).flatten(0, 1)
        total = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            rows = (ids.flatten() % 2 == number).nonzero()[:, 0]
            total.index_add_(0, rows, torch.tanh(expert(h[rows])))
        return self.readout(total.unflatten(0, ids.shape).mean(1))


class Branching(nn.Module):
    """A Python `if` on the examples, one example after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.scale = nn.Linear(3, 2), nn.Linear(3, 2), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        rows = [self.scale * torch.tanh((self.left if row[0] > 0 else self.right)(row)) for row in x]
        return torch.stack(rows)


class Recomputed(nn.Module):
    """A block behind `torch.utils.checkpoint`."""

    def __init__(self, *, use_reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.readout = nn.Linear(3, 4), nn.Linear(4, 2)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.use_reentrant is None:
            return self.readout(self.block(h))
        return self.readout(checkpoint(self.block, h, use_reentrant=self.use_reentrant))


class RecomputedInParts(Recomputed):
    def forward(self, x: Tensor) -> Tensor:
        return self.readout(checkpoint_sequential(self.block, 2, torch.tanh(self.first(x)), use_reentrant=True))


def plain() -> nn.Module:
    return Recomputed(use_reentrant=None).double()


class WritesToItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.readout = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x *= 2.0
        x[:, 0] += 1.0
        return self.readout(torch.tanh(self.linear(x)))


class Masked(nn.Module):
    """Hidden units written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.readout = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        h[:, 1:3] *= 0.5
        h += 1.0
        return self.readout(torch.tanh(h))


class OfFactories(nn.Module):
    """New tensors without a dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.readout = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), 4)
        scale = torch.eye(4)
        for _ in range(2):
            state = torch.tanh(self.linear(x) + state @ scale)
        return self.readout(state)


class Square(torch.autograd.Function):
    """Without a rule for vmap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2.0 * ctx.saved_tensors[0] * gradient


class OfFunction(nn.Module):
    """An autograd function of one's own, and a raw parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 4), nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(self.linear(x)) @ self.scale


class Differentiated(nn.Module):
    """An energy's gradient by the input, as in physics."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


class Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).squeeze()


class InParts(nn.Module):
    """A loop over chunks of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.body(part) for part in x.split(2)])


class Outside(nn.Module):
    """The model computes outside torch's graph."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.linear, self.way = nn.Linear(3, 2), way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "numpy":
            return torch.from_numpy(self.linear(x).numpy() ** 2)
        if self.way == "item":
            return torch.stack([torch.stack([self.linear(row)[0].item() * row[0], row[1]]) for row in x])
        with torch.inference_mode() if self.way == "inference_mode" else torch.no_grad():
            return torch.tanh(self.linear(x))


class PartlyOutside(nn.Module):
    """A backbone under no_grad: its parameters have no gradient, as if they were frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = torch.tanh(self.backbone(x))
        return self.head(h)


class Signs(nn.Module):
    """A jump behind a straight-through gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.readout = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return self.readout(h + (torch.sign(h) - h).detach())


def outside(way: str) -> Case:
    refused = Refused(NNTKError, "gradient|numpy", estimator="activation")
    return Case(f"forward leaves the graph by {way}", of_module(lambda: Outside(way), 3), refused)


def factories(model: nn.Module, i: int) -> Tensor:
    """Call a model with factories, whose numbers have the model's dtype."""
    torch.set_default_dtype(torch.float64)
    try:
        return model(numbers(3)[i : i + 1])
    finally:
        torch.set_default_dtype(torch.float32)


CASES = (
    Case("experts by a boolean mask", of_module(Routed, 3)),
    Case("experts on positions", of_tokens(RoutedTokens, 5, 7)),
    Case("a branch on each example", of_module(Branching, 3)),
    Case("reentrant checkpointing", of_module(lambda: Recomputed(use_reentrant=True), 3), Computed(model=plain)),
    Case("checkpointing", of_module(lambda: Recomputed(use_reentrant=False), 3), Computed(model=plain)),
    Case("checkpoint_sequential", of_module(lambda: RecomputedInParts(use_reentrant=True), 3), Computed(model=plain)),
    Case("forward writes to its input", of_module(WritesToItsInput, 3)),
    Case("first layer works in place", of_module(lambda: nn.Sequential(nn.SiLU(inplace=True), nn.Linear(3, 2)), 3)),
    Case("hidden units written in place", of_module(Masked, 3)),
    Case("factories without a dtype", lambda: Given(OfFactories(), numbers(3).float()),
         Computed(lambda m, i: m(numbers(3)[i : i + 1].float()), tolerance=1e-5)),
    Case("factories without a dtype in float64", lambda: Given(OfFactories(), numbers(3), {"dtype": torch.float64}),
         Computed(factories, model=lambda: OfFactories().double())),
    Case("autograd function of one's own", of_module(OfFunction, 3)),
    Case("a gradient inside forward", of_module(Differentiated, 3)),
    Case("squeezed output", of_module(Squeezed, 3)),
    Case("chunks of the batch", of_module(InParts, 3)),
    outside("no_grad"),
    outside("inference_mode"),
    outside("numpy"),
    Case("a backbone under no_grad", of_module(PartlyOutside, 3), Computed(estimator="activation")),
    Case("signs behind a straight-through gradient", of_module(Signs, 3), Computed(estimator="activation")),
)  # fmt: skip
