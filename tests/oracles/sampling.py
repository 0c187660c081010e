"""Brute force: nonlocal kernels from very many draws of the definition, for models that no quadrature reaches.

    radial laws   g = P·E[(f(θ+z) − f(θ)) z/|z|²],  z = r n/|n|, n standard normal, r by `radial.radius_law`
    lowrank       g = E[(f(θ+z) − f(θ)) 2z/γ²],  z = (γ/√2) A Bᵀ for tensors of two axes or more, (γ/√2) n for others

NumPy's generator, draws in pairs ±z, blocks of pairs; kernels are means over pairs of different blocks, errors their
delete-one-block jackknife, which tends to be too wide. It shares no code with the library.

Axes: m draws at a time, R blocks, n examples, C outputs, P parameters.
"""

import copy
import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from tests.oracles import brute_force, radial

Array = np.ndarray
_AT_ONCE = 4096


def nonlocal_kernel(
    model: nn.Module,
    x: Tensor,
    distribution: str,
    gamma: float,
    *,
    draws: int,
    blocks: int,
    seed: int,
    **options: float,
) -> tuple[Float[Array, "n n"], Float[Array, "n n"]]:
    """The trace kernel of all parameters and its standard error; `draws` is a multiple of 2·`blocks`.

    `options` are passed to `radial.radius_law`.
    """
    means = block_means(model, x, distribution, gamma, draws=draws, blocks=blocks, seed=seed, **options)
    products = brute_force.block_products(means, means)
    return brute_force.unbiased(products), np.sqrt(brute_force.jackknife_variance(products))


def block_means(
    model: nn.Module,
    x: Tensor,
    distribution: str,
    gamma: float,
    *,
    draws: int,
    blocks: int,
    seed: int,
    **options: float,
) -> Float[Array, "R n C P"]:
    """g_r of every block."""
    function, theta, shapes = _function(model, x)
    rng = np.random.default_rng(seed)
    centre = function(theta[None])[0]
    means = []
    for _ in range(blocks):
        total, left = np.zeros((*centre.shape, len(theta))), draws // blocks // 2
        while left:
            count = min(left, _AT_ONCE)
            z = perturbations(rng, distribution, gamma, shapes, count, **options)
            directions = 2.0 * z / gamma**2 if distribution == "lowrank" else z * len(theta) / (z**2).sum(1)[:, None]
            odd = 0.5 * (function(theta + z) - function(theta - z))  # ±z have opposite directions
            total += (odd.reshape(count, -1).T @ directions).reshape(total.shape)
            left -= count
        means.append(total / (draws // blocks // 2))
    return np.stack(means)


def perturbations(
    rng: np.random.Generator,
    distribution: str,
    gamma: float,
    shapes: list[tuple[int, ...]],
    count: int,
    **options: float,
) -> Float[Array, "m P"]:
    """Draw `count` perturbations z of tensors of these shapes, flattened and concatenated."""
    if distribution == "lowrank":
        parts = []
        for shape in shapes:
            if len(shape) < 2:
                parts.append(rng.normal(size=(count, math.prod(shape))))
                continue
            a, b = rng.normal(size=(count, shape[0], 1)), rng.normal(size=(count, 1, math.prod(shape[1:])))
            parts.append((a * b).reshape(count, -1))
        return gamma / np.sqrt(2.0) * np.concatenate(parts, axis=1)
    n = rng.normal(size=(count, sum(map(math.prod, shapes))))
    law = radial.radius_law(distribution, gamma, n.shape[1], **options)
    radius = law if isinstance(law, float) else law.ppf(rng.uniform(size=(count, 1)))
    return radius * n / np.linalg.norm(n, axis=1, keepdims=True)


def _function(model: nn.Module, x: Tensor) -> tuple[Callable[[Array], Array], Array, list[tuple[int, ...]]]:
    """θ ↦ f(x; θ) for many θ, (m, P) to (m, n, C), with the model's own θ and the shapes of its tensors."""
    model = copy.deepcopy(model).double().eval()
    named = dict(model.named_parameters())
    theta = torch.cat([value.detach().reshape(-1) for value in named.values()])
    shapes = [tuple(value.shape) for value in named.values()]

    def one(flat: Tensor) -> Tensor:
        parts = flat.split([math.prod(shape) for shape in shapes])
        tensors = {name: part.reshape(shape) for name, part, shape in zip(named, parts, shapes, strict=True)}
        return functional_call(model, tensors, (x,)).reshape(len(x), -1)

    def function(points: Array) -> Array:
        with torch.no_grad():
            return vmap(one)(torch.from_numpy(points)).numpy()

    return function, theta.numpy(), shapes
