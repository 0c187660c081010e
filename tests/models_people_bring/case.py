"""A row of the table: a model as people bring it, and what is right for it.

Axes: n examples.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nntk_dist.errors import NNTKError
from tests.oracles.autograd_loop import kernel_by_loop

N = 4


@dataclass(frozen=True)
class Given:
    """What a user passes.

    Attributes:
        model: the model.
        x: its examples.
        options: further arguments of the public functions, such as `output`.
    """

    model: nn.Module
    x: Any
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Computed:
    """The kernel is computed, and equals an oracle's.

    Attributes:
        function: `function(model, i)`, f of example i; None for the model on row i of its one input.
        model: makes the oracle's model, if it is not the user's own.
        parameters: the parameters of the kernel; None for all.
        tolerance: of the local kernel, relative to its largest entry.
        estimator: what the default nonlocal kernel takes: `autodiff` for a smooth model.
    """

    function: Callable[[nn.Module, int], Tensor] | None = None
    model: Callable[[], nn.Module] | None = None
    parameters: tuple[str, ...] | None = None
    tolerance: float = 1e-10
    estimator: str = "autodiff"


@dataclass(frozen=True)
class Refused:
    """An error of the library with the true reason.

    Attributes:
        error: its type.
        match: a regular expression of its message.
        estimator: what computes the nonlocal kernel, if only gradients are refused; None if all kernels are.
    """

    error: type[NNTKError]
    match: str
    estimator: str | None = None


@dataclass(frozen=True)
class Case:
    """A kind of model.

    Attributes:
        name: of the kind.
        make: makes the model with its examples and options.
        right: what is right.
    """

    name: str
    make: Callable[[], Given]
    right: Computed | Refused = Computed()

    def given(self) -> Given:
        """Make the model and its examples, in a generator state of their own."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make()

    def expected(self) -> Tensor:
        """Return the oracle's local kernel."""
        assert isinstance(self.right, Computed)
        right, given = self.right, self.given()
        model = copy.copy(given.model)
        if right.model is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = right.model()

        def row(model: nn.Module, i: int) -> Tensor:
            result = model(given.x[i : i + 1].clone())
            assert isinstance(result, Tensor)
            return result

        return kernel_by_loop(model.eval(), right.function or row, N, right.parameters)


def numbers(*shape: int) -> Tensor:
    """Return n examples of standard normal numbers, always the same ones, in float64."""
    return torch.randn(N, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def tokens(length: int, vocabulary: int) -> Tensor:
    """Return n sequences of token ids, always the same ones."""
    return torch.randint(0, vocabulary, (N, length), generator=torch.Generator().manual_seed(2))


def of_module(make: Callable[[], nn.Module], *shape: int, **options: Any) -> Callable[[], Given]:
    """Make a model in float64 for examples of this shape."""
    return lambda: Given(make().double(), numbers(*shape), options)


def of_tokens(make: Callable[[], nn.Module], length: int, vocabulary: int, **options: Any) -> Callable[[], Given]:
    """Make a model in float64 for sequences of token ids."""
    return lambda: Given(make().double(), tokens(length, vocabulary), options)
