"""What the library computes cleverly, computed plainly: one gradient, one draw, one pair of blocks at a time.

Two halves. Gradients: automatic differentiation example by example and output by output, in float64. Draws: estimates,
block means, the products of every pair of blocks, and the statistics of those products by explicit loops over pairs,
left-out blocks and distinct 4-tuples of blocks. There are no algebraic shortcuts and no sampling: the perturbations are
arguments. This is slow: use P of a few hundred at most, R ≤ 6 and a handful of examples.

Axes: S draws, R blocks, n (n1, n2) examples, C outputs, P parameters, N (N1, N2) rows of a kernel: n for `trace` and
for one output, n·C for `full`, with index i·C + c.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Array = np.ndarray
Outputs = str | int


# Gradients ------------------------------------------------------------------------------------------------------------


def selected_names(model: nn.Module, patterns: Sequence[str] = ("*",)) -> list[str]:
    """Names of the parameters that match a pattern, in the model's order, each tensor once under its first name.

    A shared tensor is selected if any of its names matches.
    """
    first_name: dict[int, str] = {}
    selected: dict[str, None] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first_name.setdefault(id(parameter), name)
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            selected[first_name[id(parameter)]] = None
    return [name for name, _ in model.named_parameters() if name in selected]


def per_example_gradients(model: nn.Module, x: Tensor, patterns: Sequence[str] = ("*",)) -> Float[Array, "n C P"]:
    """∇_θ f_c(x_i; θ) by one backward pass per example and output, on a float64 copy of the model, frozen or not.

    P runs over the selected parameters in the model's order, each flattened by rows. The example is passed as a batch
    of one, in the mode (train or eval) that the model is in.
    """
    model = copy.deepcopy(model).double()
    names = selected_names(model, patterns)
    parameters = [dict(model.named_parameters())[name].requires_grad_(True) for name in names]
    rows = []
    for example in x:
        outputs = _forward(model, example).reshape(-1)
        gradients = []
        for output in outputs:
            parts = torch.autograd.grad(output, parameters, retain_graph=True, materialize_grads=True)
            gradients.append(torch.cat([part.reshape(-1) for part in parts]))
        rows.append(torch.stack(gradients))
    return torch.stack(rows).numpy()


def function_of_parameters(
    model: nn.Module, x: Tensor, patterns: Sequence[str] = ("*",)
) -> tuple[Callable[[Array], Array], Float[Array, " P"]]:
    """θ ↦ f(x; θ) as a function (P,) → (n, C) of the selected parameters in float64, and the model's own θ.

    Every call works on its own copy of the model and passes the examples one by one.
    """
    model = copy.deepcopy(model).double()
    names = selected_names(model, patterns)
    theta = torch.cat([dict(model.named_parameters())[name].detach().reshape(-1) for name in names]).numpy()

    def function(theta: Array) -> Array:
        moved = copy.deepcopy(model)
        offset = 0
        with torch.no_grad():
            for name in names:
                parameter = dict(moved.named_parameters())[name]
                values = torch.from_numpy(np.array(theta[offset : offset + parameter.numel()]))
                parameter.copy_(values.reshape(parameter.shape))
                offset += parameter.numel()
            return torch.stack([_forward(moved, example).reshape(-1) for example in x]).numpy()

    return function, theta


def _forward(model: nn.Module, example: Tensor) -> Tensor:
    """The model's outputs for one example, passed as a batch of one; a copy, as models may work in place."""
    batch = example[None].clone()
    return model(batch.double() if batch.is_floating_point() else batch)


def rows_of(gradients: Float[Array, "... n C P"], outputs: Outputs) -> Float[Array, "... N Q"]:
    """Rows whose inner products are the kernel: n×(C·P) for `trace`, (n·C)×P for `full`, n×P for one output."""
    *lead, n, num_outputs, num_parameters = gradients.shape
    if outputs == "trace":
        return gradients.reshape(*lead, n, num_outputs * num_parameters)
    if outputs == "full":
        return gradients.reshape(*lead, n * num_outputs, num_parameters)
    return gradients[..., :, int(outputs), :]


def kernel_of(gradients1: Array, gradients2: Array, outputs: Outputs = "trace") -> Float[Array, "N1 N2"]:
    """⟨gradient, gradient'⟩ entry by entry."""
    rows1, rows2 = rows_of(gradients1, outputs), rows_of(gradients2, outputs)
    return np.array([[float(np.dot(row1, row2)) for row2 in rows2] for row1 in rows1])


def local_kernel(
    model: nn.Module, x1: Tensor, x2: Tensor, outputs: Outputs = "trace", patterns: Sequence[str] = ("*",)
) -> Float[Array, "N1 N2"]:
    """The ordinary empirical tangent kernel ⟨∇f(x), ∇f(x')⟩."""
    return kernel_of(per_example_gradients(model, x1, patterns), per_example_gradients(model, x2, patterns), outputs)


# Draws ----------------------------------------------------------------------------------------------------------------


def weight_draws(
    function: Callable[[Array], Array], theta: Float[Array, " P"], perturbations: Float[Array, "S P"]
) -> Float[Array, "S n C P"]:
    """g_s = P (f(θ + z_s) − f(θ)) z_s/|z_s|², one draw after the other, z_s as given. `function`: (P,) → (n, C)."""
    centre = function(theta)
    draws = []
    for z in perturbations:
        change = function(theta + z) - centre
        draws.append(len(theta) * change[:, :, None] * z / np.dot(z, z))
    return np.stack(draws)


def gradient_draws(
    model: nn.Module, x: Tensor, perturbations: Float[Array, "S P"], patterns: Sequence[str] = ("*",)
) -> Float[Array, "S n C P"]:
    """∇f(x; θ + z_s), one draw after the other; the given z_s already contain the factor U^(1/P)."""
    draws = []
    for z in perturbations:
        moved, offset = copy.deepcopy(model).double(), 0
        with torch.no_grad():
            for name in selected_names(moved, patterns):
                parameter = dict(moved.named_parameters())[name]
                parameter.add_(torch.from_numpy(z[offset : offset + parameter.numel()].copy()).reshape(parameter.shape))
                offset += parameter.numel()
        draws.append(per_example_gradients(moved, x, patterns))
    return np.stack(draws)


def block_means(draws: Float[Array, "S n C P"], block_of_draw: Int[Array, " S"]) -> Float[Array, "R n C P"]:
    """g_r, the mean of the draws labelled r = 0 … R−1. Blocks are equal, so their mean is the mean of all draws."""
    labels, counts = np.unique(block_of_draw, return_counts=True)
    assert np.array_equal(labels, np.arange(len(labels))), f"blocks are not numbered from 0: {labels}"
    assert len(set(counts)) == 1, f"blocks of unequal size: {counts}"
    return np.stack([draws[block_of_draw == label].mean(0) for label in labels])


def block_products(
    means1: Float[Array, "R n1 C P"], means2: Float[Array, "R n2 C P"], outputs: Outputs = "trace"
) -> Float[Array, "R R N1 N2"]:
    """h_rr' = ½ [g_r(x)·g_r'(x') + g_r'(x)·g_r(x')] for every pair of blocks, r = r' included."""
    num_blocks = len(means1)
    products = [[kernel_of(means1[r], means2[s], outputs) for s in range(num_blocks)] for r in range(num_blocks)]
    return np.array([[(products[r][s] + products[s][r]) / 2.0 for s in range(num_blocks)] for r in range(num_blocks)])


def plugin(means1: Array, means2: Array, outputs: Outputs = "trace") -> Float[Array, "N1 N2"]:
    """⟨mean, mean⟩ over all draws."""
    return kernel_of(means1.mean(0), means2.mean(0), outputs)


def unbiased(products: Float[Array, "R R ..."], blocks: Iterable[int] | None = None) -> Float[Array, "..."]:
    """U, the mean of h_rr' over pairs of different blocks; over the given `blocks` only, if any."""
    kept = list(range(len(products)) if blocks is None else blocks)
    return np.mean([products[r, s] for r, s in itertools.permutations(kept, 2)], axis=0)


def jackknife_variance(products: Float[Array, "R R ..."]) -> Float[Array, "..."]:
    """J = (R−1)/R · Σ_r (U without block r − their mean)², each U recomputed from the blocks that remain."""
    num_blocks = len(products)
    left_out = np.stack([unbiased(products, [s for s in range(num_blocks) if s != r]) for r in range(num_blocks)])
    return (num_blocks - 1) / num_blocks * ((left_out - left_out.mean(0)) ** 2).sum(0)


def unbiased_variance(products: Float[Array, "R R ..."]) -> Float[Array, "..."]:
    """V = U² − the mean of h_ab h_cd over all 4-tuples of distinct blocks. It is unbiased for Θ²: V for Var U."""
    disjoint = [products[a, b] * products[c, d] for a, b, c, d in itertools.permutations(range(len(products)), 4)]
    return unbiased(products) ** 2 - np.mean(disjoint, axis=0)


def calibrated_stderr(products: Float[Array, "R R ..."]) -> Float[Array, "..."]:
    """√(J · clip(mean V / mean J, (R−2)/(2(R−1)), 1)), the means over all entries; NaN (unresolved) if J is 0."""
    num_blocks = len(products)
    jackknife, unbiased_ = jackknife_variance(products), unbiased_variance(products)
    level = np.clip(unbiased_.mean() / jackknife.mean(), (num_blocks - 2) / (2 * (num_blocks - 1)), 1.0)
    return np.sqrt(np.where(jackknife == 0, np.nan, jackknife * level))
