"""The laws of a perturbation: mean squares, radii, directions; slices; refusals.

The laws of the radii are written here independently, with `scipy.stats`.

Axes: s draws, P parameters.
"""

import pickle
from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest
import torch
from scipy import stats

from nntk_dist.errors import NNTKError
from nntk_dist.models.parameters import select_parameters
from nntk_dist.sampling.draws import Drawing
from nntk_dist.sampling.laws import Student, make_law, radial_names
from nntk_dist.spec import KernelSpec
from tests.oracles.cases import case
from tests.oracles.radial import radius_law

GAMMA = 0.8
LAWS = [(name, {}) for name in radial_names()] + [
    ("fractional", {"alpha": 0.0}),
    ("fractional", {"alpha": 0.8}),
    ("student", {"nu": 4.5}),
]
# Every law and every design; `test_draws` has both designs for one law.
IN_TURN = list(zip(radial_names(), cycle(["iid", "antithetic"]), strict=False))


def drawing(name: str, *, draws: int = 16, parameters: int = 7, design: str = "iid", **options) -> Drawing:
    return Drawing(make_law(name, GAMMA, **options), draws, 4, parameters, design)


def everything(some: Drawing) -> torch.Tensor:
    return some.perturbations(range(some.num_draws), dtype=torch.float64)


@pytest.mark.parametrize("parameters", [1, 2, 9])
@pytest.mark.parametrize(("name", "options"), LAWS)
def test_mean_square_and_radii(name, options, parameters):
    radii = everything(drawing(name, draws=20_000, parameters=parameters, **options)).norm(dim=1).numpy()
    squares, expected = radii**2, parameters * GAMMA**2 / 2
    assert abs(squares.mean() - expected) < 3.9 * squares.std() / np.sqrt(len(squares)) + 1e-12
    law = radius_law(name, GAMMA, parameters, **options)
    if name == "sphere":
        np.testing.assert_allclose(radii, law, rtol=1e-14)
    else:
        assert stats.kstest(radii, law.cdf).pvalue > 1e-3


@pytest.mark.parametrize(("name", "options"), LAWS)
def test_directions_are_uniform_and_independent_of_the_radius(name, options):
    z = everything(drawing(name, draws=20_000, parameters=3, **options))
    radii = z.norm(dim=1)
    heights = (z / radii[:, None])[:, 0].numpy()  # by Archimedes uniform on [-1, 1]
    assert stats.kstest(heights, stats.uniform(-1, 2).cdf).pvalue > 1e-3
    if name != "sphere":
        assert stats.spearmanr(heights, radii.numpy()).pvalue > 1e-3
        assert stats.spearmanr(np.abs(heights), radii.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(("name", "design"), IN_TURN)
def test_slices_are_part_of_the_whole(name, design):
    some = drawing(name, design=design, parameters=40_000)  # more than one slice
    whole = everything(some)
    for draws, low, high in ((range(16), 0, 40_000), (range(3, 9), 2, 39_999), (range(15, 16), 17_000, 17_001)):
        part = some.perturbations(draws, low, high, dtype=torch.float64)
        torch.testing.assert_close(part, whole[draws.start : draws.stop, low:high], rtol=1e-14, atol=0)
        assert torch.equal(part, some.perturbations(draws, low, high, dtype=torch.float64))
    single = some.perturbations(range(16), dtype=torch.float32)
    torch.testing.assert_close(single.double(), whole, rtol=4 * 2.0**-24, atol=0)


@pytest.mark.parametrize(("name", "design"), IN_TURN)
def test_direction_products_and_norms(name, design):
    some = drawing(name, design=design, draws=16, parameters=70_000)
    z = everything(some)
    v = 70_000 * z / z.square().sum(1, keepdim=True)
    torch.testing.assert_close(some.directions(z), v, rtol=1e-13, atol=0)
    expected = v @ v.T
    torch.testing.assert_close(some.direction_products(), expected, rtol=0, atol=1e-12 * float(expected.max()))
    torch.testing.assert_close(some.squared_norms(), z.square().sum(1), rtol=1e-12, atol=0)


def test_radii_share_nothing_with_the_shrinkage_of_autodiff():
    """For the uniform ball |z|/R = U^{1/P}, which would reveal a shared U."""
    some = drawing("ball", draws=4000, parameters=2)
    radii = everything(some).norm(dim=1).numpy()
    assert stats.spearmanr(radii, some.shrinkage(range(4000)).numpy()).pvalue > 1e-3


def test_pairs_share_their_radius():
    for name in radial_names():
        z = everything(drawing(name, design="antithetic"))
        assert torch.equal(z[0::2], -z[1::2])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fractional", {"alpha": 1.0}, r"alpha is 1\.0; allowed: a number from 0 to below 1"),
        ("fractional", {"alpha": -0.1}, r"alpha is -0\.1; allowed: a number from 0 to below 1"),
        ("student", {"nu": 2.0}, r"nu is 2\.0; allowed: a number above 2"),
        ("student", {"nu": float("inf")}, r"nu is inf; allowed: a number above 2"),
        ("lowrank", {"rank": 0}, r"rank is 0; allowed: a whole number, 1 or more"),
        ("lowrank", {"rank": 1.5}, r"rank is 1\.5; allowed: a whole number, 1 or more"),
        ("gaussian", {"nu": 4}, r"nu is 4, but it is an option of student; allowed for distribution gaussian: none"),
        ("student", {"alpha": 0.5}, r"alpha is 0\.5, but it is an option of fractional; .* student: nu"),
        ("student", {"mu": 0.5}, r"an option of distribution student is 'mu'; allowed: nu"),
        ("cauchy", {}, r"distribution is 'cauchy'; allowed: gaussian, sphere, ball, fractional, student, lowrank"),
    ],
)
def test_options_that_are_refused(name, options, message):
    with pytest.raises(NNTKError, match=message):
        make_law(name, 1.0, **options)


def test_a_mapping_spells_name_and_options():
    spec = KernelSpec(distribution={"name": "student", "nu": np.float64(4)})
    assert spec == KernelSpec(gamma=0.05, distribution={"name": "student", "options": {"nu": 4}})
    assert spec.distribution == Student(gamma=0.05, nu=4.0)
    assert type(spec.distribution.nu) is float
    assert hash(spec) == hash(pickle.loads(pickle.dumps(spec)))
    assert replace(spec, seed=3).distribution == Student(gamma=0.05, nu=4.0)
    with pytest.raises(NNTKError, match=r"an option of distribution student is 'mu'; allowed: nu"):
        KernelSpec(distribution={"name": "student", "mu": 4})
    with pytest.raises(NNTKError, match=r"nu is '4'; allowed: a number above 2"):
        KernelSpec(distribution={"name": "student", "nu": "4"})


def test_student_needs_moments_that_grow_with_the_depth():
    """Any ν suffices for two layers of weights; three need more than 4."""
    spec, wide = (KernelSpec(distribution={"name": "student", "nu": nu}) for nu in (4.0, 4.5))
    for name, allowed in (("relu_mlp", True), ("deep_relu_mlp", False)):
        model = case(name).build()
        space = select_parameters(model)
        assert space.num_weight_layers == (2 if allowed else 3)
        wide.drawing("weight", space, model)
        if allowed:
            spec.drawing("weight", space, model)
            continue
        with pytest.raises(NNTKError, match=r"nu is 4, but 3 layers of weights are perturbed, .* allowed: above 4"):
            spec.drawing("weight", space, model)
        spec.drawing("weight", select_parameters(model, ["0.*", "2.*", "*bias"]), model)  # two of the three
