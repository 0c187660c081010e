"""Weights of draws, noise of models and a requested accuracy in combination; other files test each alone.

Axes: s draws, n examples, c outputs.
"""

import numpy as np
import pytest
import torch

from nntk_dist import Dropout, fixed_noise, nonlocal_kernel
from nntk_dist.models.evaluation import outputs
from nntk_dist.models.parameters import select_parameters
from nntk_dist.sampling.draws import Drawing
from nntk_dist.sampling.laws import Gaussian
from tests.harness.tools import assert_equal
from tests.library.noisy_models import X, network
from tests.oracles import brute_force
from tests.oracles.cases import case

GAMMA, DRAWS, BLOCKS, TAU = 0.7, 48, 4, 0.3


@pytest.mark.parametrize("design", ["iid", "antithetic"])
@pytest.mark.parametrize("per_example", [False, True])
def test_weights_see_the_noise_of_their_draw(per_example, design):
    """Against a dense computation: each draw's two evaluations and its score use the noise of its group."""
    model = network(Dropout(0.4))
    space = select_parameters(model)
    drawing = Drawing(Gaussian(GAMMA), DRAWS, BLOCKS, space.num_parameters, design)
    z = drawing.perturbations(range(DRAWS), dtype=torch.float64)
    base = space.values(model)
    scale = outputs_of(model, 0).square().sum(1).mean()
    gradients, scores = [], []
    for s, one in enumerate(z):
        group = s // drawing.group_size
        unmoved = outputs_of(model, group)
        with fixed_noise(model, 0, group), torch.no_grad():
            moved = outputs(model, X, space.moved(base, one))
        change = (moved - unmoved).double()
        direction = space.num_parameters * one / one.square().sum()
        gradients.append(change[:, :, None] * direction)
        own = -change.square().sum(1) / scale
        scores.append(own if per_example else own.mean().expand(len(X)))
    weights = torch.stack(scores).unflatten(0, (BLOCKS, -1)).div(TAU).softmax(1)
    means = (torch.stack(gradients).unflatten(0, (BLOCKS, -1)) * weights[..., None, None]).sum(1).numpy()
    weighting = {"name": "output", "temperature": TAU, "per_example": per_example}
    result = nonlocal_kernel(model, X, gamma=GAMMA, draws=DRAWS, blocks=BLOCKS, weighting=weighting, design=design)
    assert_equal(result.plugin, brute_force.plugin(means, means))
    assert_equal(result.unbiased, brute_force.unbiased(brute_force.block_products(means, means)))


def outputs_of(model: torch.nn.Module, group: int) -> torch.Tensor:
    """f(x; θ) under the noise of a group; otherwise `model` is under the noise of group 0, like a kernel's copy."""
    with fixed_noise(model, 0, group), torch.no_grad():
        return model(X)


OUTPUT = {"name": "output", "temperature": 0.5}


@pytest.mark.parametrize(
    ("noise", "weighting"),
    [(True, None), (False, None), (False, OUTPUT), pytest.param(True, OUTPUT, marks=pytest.mark.statistical)],
)
def test_an_asked_accuracy_is_reached(noise, weighting):
    model, x = (network(Dropout(0.2)), X) if noise else (case("relu_mlp").build(), case("relu_mlp").inputs(6))
    options = {"gamma": 0.7, "estimator": "weight" if weighting else "auto", "weighting": weighting}
    result = nonlocal_kernel(model, x, rtol=0.25, **options)
    assert result.reached
    again = nonlocal_kernel(model, x, draws=result.draws, **options)
    assert torch.equal(result.kernel, again.kernel)
    # two independent kernels of that accuracy differ by at most the sum of their errors, at 95 % each
    other = nonlocal_kernel(model, x, draws=result.draws, seed=1, **options)
    distance = np.linalg.norm((result.kernel - other.kernel).numpy()) / np.linalg.norm(other.kernel.numpy())
    assert 0 < distance < 0.5
