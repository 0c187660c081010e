"""Mixed precision inside a model, and models of half precision: right to the lowest precision in them.

Axes: n examples.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.models_people_bring.case import Case, Computed, Given, numbers, of_module

FLOAT32, BFLOAT16 = 1e-5, 0.1  # relative errors of kernels whose factors are rounded so


class NormInFloat32(nn.Module):
    """As language models normalise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class FloatLogits(nn.Module):
    def __init__(self, to: torch.dtype) -> None:
        super().__init__()
        self.body, self.to_dtype = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), to

    def forward(self, x: Tensor) -> Tensor:
        return torch.log_softmax(self.body(x).to(self.to_dtype), -1)


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.body(x)


class HalfBlock(nn.Module):
    """One block of the model in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.low = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        low = nn.functional.linear(h.bfloat16(), self.low.weight.bfloat16(), self.low.bias.bfloat16())
        return self.last(torch.tanh(low.to(h.dtype)))


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def of_half(dtype: torch.dtype) -> Callable[[], Given]:
    return lambda: Given(small().to(dtype), numbers(3))


def in_double(dtype: torch.dtype) -> Callable[[], nn.Module]:
    """The same parameters, computed with in float64."""
    return lambda: small().to(dtype).double()


CASES = (
    Case(
        "a norm in float32",
        of_module(lambda: nn.Sequential(nn.Linear(3, 4), NormInFloat32(), nn.Tanh(), nn.Linear(4, 2)), 3),
        Computed(tolerance=FLOAT32),
    ),
    Case("logits in float32", of_module(lambda: FloatLogits(torch.float32), 3), Computed(tolerance=FLOAT32)),
    Case("logits in float64", lambda: Given(FloatLogits(torch.float64), numbers(3).float()),
         Computed(lambda m, i: m(numbers(3)[i : i + 1].float()), tolerance=FLOAT32)),
    Case("autocast to bfloat16", lambda: Given(Autocast(), numbers(3).float()),
         Computed(lambda m, i: m(numbers(3)[i : i + 1].float()), tolerance=BFLOAT16)),
    Case("autocast around a float64 model", of_module(Autocast, 3), Computed(tolerance=BFLOAT16)),
    Case("a block in bfloat16", of_module(HalfBlock, 3), Computed(tolerance=BFLOAT16)),
    Case("bfloat16 model", of_half(torch.bfloat16), Computed(model=in_double(torch.bfloat16), tolerance=FLOAT32)),
    Case("float16 model", of_half(torch.float16), Computed(model=in_double(torch.float16), tolerance=FLOAT32)),
    Case("float32 model", lambda: Given(small(), numbers(3).float()),
         Computed(lambda m, i: m(numbers(3)[i : i + 1].float()), tolerance=FLOAT32)),
    Case("float64 of a float32 model", lambda: Given(small(), numbers(3), {"dtype": torch.float64}),
         Computed(model=in_double(torch.float32))),
)  # fmt: skip
