"""Modules with noise: a random function f(·; θ, ω), whose ω is a pure function of (seed, group, module, number).

A kernel's nonlocal gradient is then g(x) = E_{z,ω}[P (f(x; θ+z, ω) − f(x; θ, ω)) z/|z|²], an expectation over ω. Each
group of draws has its own ω, shared by the two evaluations of a draw, by the dependent draws of a group and by all
examples: one group is one random function, so no example depends on its batch. Here a model's modules get the ω of
the present pass and take numbers of it; estimators choose which. Noise of an example's own is not allowed: f(x) would
be a function of more than x.

Axes: n examples; the axes of a unit are those behind the examples' axis.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nntk_dist.errors import ArgumentError, ModelError, Unavailable
from nntk_dist.sampling.philox import normal, uniform
from nntk_dist.sampling.streams import Stream

# Of the 50 bits of an index 18 count the requests of a module in a pass, 32 the numbers of a request.
_REQUEST_NUMBERS = 1 << 32
_MOST_REQUESTS = 1 << 18
_MOST_MODULES = 1 << 16
_ROUGH_AGREEMENT = 1e-3
# The mean over these random functions estimates the expected output of a model. Draws count from 0, so they differ.
MEAN_FUNCTIONS = range(1 << 31, (1 << 31) + 64)


@dataclass(frozen=True)
class Noise:
    """Which random function a module is part of: ω = `group` of `seed`; `module` is its number in the model."""

    seed: int = 0
    group: int = 0
    module: int = 0


class StochasticModule(nn.Module):
    """A module whose forward pass takes random numbers from `normals` and `uniforms`, and from nowhere else.

        class Jitter(StochasticModule):
            def forward(self, u):
                return u + 0.1 * self.normals(u.shape[1:], like=u)

    In eval mode they are numbers of the present ω (`nntk_dist.models.noise`): every request of a pass, in its order,
    gets its own numbers, so a module that is called twice has fresh noise in each call. Shapes leave out the
    examples' axis: all examples share them. (A request with that axis would tie an example to its place in the batch,
    which is refused when a kernel is planned.) Set `differentiable` to False in a subclass that is not Lipschitz in its
    input: then no gradient of it is taken.

    In training mode the numbers are torch's own. Outside a kernel and `fixed_noise`, in eval mode, every request gets
    the same numbers: the first request's numbers of function 0 of seed 0.
    """

    differentiable = True

    def __init__(self) -> None:
        super().__init__()
        self._noise: Noise | None = None
        self._num_requests = 0

    def normals(self, shape: tuple[int, ...], *, like: Tensor) -> Float[Tensor, "..."]:
        """Return standard normals, of the dtype and device of `like`."""
        if self.training:
            return torch.randn(shape, dtype=like.dtype, device=like.device)
        noise, start, count = self._request(shape)
        groups = torch.tensor([noise.group], dtype=torch.int64, device=like.device)
        stop = start + count
        values = normal(noise.seed, Stream.MODEL, groups, start, stop, draw=noise.module, dtype=like.dtype)
        return values.reshape(shape)

    def uniforms(self, shape: tuple[int, ...], *, like: Tensor) -> Float[Tensor, "..."]:
        """Return Uniform(0, 1) numbers in float64, on the device of `like`."""
        if self.training:
            return torch.rand(shape, dtype=torch.float64, device=like.device)
        noise, start, count = self._request(shape)
        groups = torch.tensor([noise.group], dtype=torch.int64, device=like.device)
        return uniform(noise.seed, Stream.MODEL, groups, count, draw=noise.module, start=start).reshape(shape)

    @property
    def noise(self) -> Noise:
        """The current ω, for a module that generates its numbers from its own counters in `Stream.MODEL`.

        In training mode it is a function that torch's generator chooses anew each time.
        """
        if self.training:
            return Noise(group=int(torch.randint(1 << 32, ())))
        return self._noise or Noise()

    def _request(self, shape: tuple[int, ...]) -> tuple[Noise, int, int]:
        """The present ω, and the first index and the count of the numbers of this request."""
        count = math.prod(shape)
        if self._num_requests >= _MOST_REQUESTS or count > _REQUEST_NUMBERS:
            raise ModelError(
                f"a {type(self).__name__} asks for noise the {self._num_requests + 1}th time in one pass, for {count} "
                f"numbers; allowed: {_MOST_REQUESTS} times, {_REQUEST_NUMBERS} numbers"
            )
        start = self._num_requests * _REQUEST_NUMBERS
        if self._noise is not None:
            self._num_requests += 1
        return self.noise, start, count


def noise_modules(model: nn.Module) -> dict[str, StochasticModule]:
    """Return the modules of a model that take random numbers, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, StochasticModule)}


def is_random(model: nn.Module) -> bool:
    """Return whether some part of the model takes random numbers."""
    return any(isinstance(module, StochasticModule) for module in model.modules())


@contextmanager
def fixed_noise(model: nn.Module, seed: int = 0, group: int = 0) -> Iterator[None]:
    """Inside, every pass through the model in eval mode is the same random function: number `group` of `seed`.

    Two models of equal structure are the same function of their parameters. `group` counts from 0 to 2^32 − 1.
    Raises: ArgumentError for a group, ModelError for a number of modules, out of range.
    """
    modules = list(noise_modules(model).values())
    before = [module._noise for module in modules]
    registered = bool(modules) and _begin_pass not in model._forward_pre_hooks.values()
    handle = model.register_forward_pre_hook(_begin_pass) if registered else None
    _set_noise(modules, seed, group)
    try:
        yield
    finally:
        for module, noise in zip(modules, before, strict=True):
            module._noise, module._num_requests = noise, 0
        if handle is not None:
            handle.remove()


def fix_noise(model: nn.Module) -> None:
    """Make a private model one fixed random function, number 0 of seed 0, wherever `fixed_noise` does not choose."""
    modules = list(noise_modules(model).values())
    if modules and _begin_pass not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_begin_pass)
    _set_noise(modules, 0, 0)


def _set_noise(modules: list[StochasticModule], seed: int, group: int) -> None:
    if len(modules) > _MOST_MODULES:
        raise ModelError(f"the model has {len(modules)} modules with noise; allowed: {_MOST_MODULES}")
    if not 0 <= group < 1 << 32:
        raise ArgumentError(f"group is {group}; allowed: 0 to {(1 << 32) - 1}")
    for number, module in enumerate(modules):
        module._noise, module._num_requests = Noise(seed, group, number), 0


def _begin_pass(model: nn.Module, args: tuple) -> None:
    """A pass begins: requests count from 0 again. A hook of the model as a whole, found on copies of it too."""
    for module in model.modules():
        if isinstance(module, StochasticModule):
            module._num_requests = 0


def check_gradients(model: nn.Module, kind: str, estimator: str) -> str | None:
    """Say why no gradients of a random model can be taken; None if they can.

    Raises:
        ModelError: this kind of kernel needs gradients.
        Unavailable: the estimator `autodiff` is requested.
    """
    modules = noise_modules(model)
    if modules and kind == "local":
        raise ModelError(
            f"kind is 'local', but the model draws noise (module '{next(iter(modules))}'), so that it has no one "
            "gradient; use kind: averaged, which is the mean over noise and draws and tends to the mean of the local "
            "kernels as gamma does to 0"
        )
    rough = next((path for path, module in modules.items() if not module.differentiable), None)
    if rough is None:
        return None
    reason = f"the noise of module '{rough}' makes the model nowhere differentiable"
    if kind == "averaged":
        raise ModelError(f"kind is 'averaged', which uses gradients, but {reason}; use kind: nonlocal, covariance")
    if estimator == "autodiff":
        raise Unavailable(f"estimator is 'autodiff', but {reason}; use estimator: weight, activation or auto")
    return reason


def agreement(model: nn.Module, usual: float) -> float:
    """Return the relative tolerance with which two passes through a model count as equal: `usual`, or 1e-3.

    Noise that is not Lipschitz magnifies rounding from layer to layer; the differences to be detected are far larger.
    """
    rough = any(not module.differentiable for module in noise_modules(model).values())
    return _ROUGH_AGREEMENT if rough else usual


def noise_text(model: nn.Module) -> str:
    """Say, for the reason of a decision, what noise means for the kernel; empty without noise."""
    count = len(noise_modules(model))
    return f"; the noise of {count} module{'s' * (count > 1)} is part of the expectation" if count else ""
