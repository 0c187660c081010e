"""Low-rank perturbations: their ranks, second moments and slices, their kernel by definition and by quadrature.

Axes: s draws, P parameters.
"""

import itertools

import numpy as np
import pytest
import torch
from scipy import integrate, special
from torch import Tensor, nn

from nntk_dist import NNTKError, averaged_kernel, covariance_kernel, nonlocal_kernel
from nntk_dist.layers.low_rank_passes import find_low_rank_passes
from nntk_dist.models.evaluation import Evaluator
from nntk_dist.models.parameters import select_parameters
from nntk_dist.planning.stacking import StackingTrial
from nntk_dist.sampling.draws import Drawing
from nntk_dist.sampling.laws import LowRank
from nntk_dist.spec import KernelSpec
from tests.harness.tools import assert_equal
from tests.oracles import brute_force
from tests.oracles.cases import case
from tests.oracles.statistics import assert_agrees, assert_power

SHAPES = ((5, 7), (5,), (3, 4, 2), (), (2, 900))
SIZES = [int(np.prod(shape)) for shape in SHAPES]


def drawing(rank: int = 1, draws: int = 16, design: str = "iid", scales: tuple[float, ...] = ()) -> Drawing:
    return Drawing(LowRank(0.8, rank), draws, 4, sum(SIZES), design, shapes=SHAPES, scales=scales)


def everything(some: Drawing) -> Tensor:
    return some.perturbations(range(some.num_draws), dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_matrices_have_the_rank(rank):
    z = everything(drawing(rank))
    for part, shape in zip(z.split(SIZES, dim=1), SHAPES, strict=True):
        if len(shape) >= 2:
            ranks = torch.linalg.matrix_rank(part.reshape(16, shape[0], -1))
            assert (ranks == min(rank, shape[0])).all()


class Tokens(nn.Module):
    """Linear layers on several positions, one of them used twice, and a convolution that is not perturbed."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(3, 4, 1).double()
        self.twice, self.readout = nn.Linear(4, 4).double(), nn.Linear(4, 2, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.convolution(x.mT).mT
        return self.readout(torch.tanh(self.twice(torch.tanh(self.twice(h)))).mean(1))


@pytest.mark.parametrize("design", ["iid", "antithetic"])
@pytest.mark.parametrize("gamma_scale", ["absolute", "relative"])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_shared_product_is_the_perturbed_model_without_its_weights(design, gamma_scale, rank):
    model, x = Tokens(), torch.randn(5, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    space = select_parameters(model, ("twice.*", "readout.weight"))
    spec = KernelSpec(
        gamma=0.7,
        distribution={"name": "lowrank", "rank": rank},
        design=design,
        gamma_scale=gamma_scale,
        draws=16,
        blocks=4,
    )
    some, evaluator = spec.drawing("weight", space, model), Evaluator(model, space, stacked=True)
    shared = find_low_rank_passes(evaluator, some, x)
    assert shared is not None
    expected = Evaluator(model, space).perturbed(x, some.perturbations(range(4, 12), dtype=torch.float64))
    for batch in (None, 2):
        values = shared.perturbed(x, range(4, 12), batch)
        torch.testing.assert_close(values, expected, rtol=1e-11, atol=1e-12)
    assert shared.numbers_of_a_draw == rank * 8 + 4 + rank * 6


def test_products_are_shared_only_where_every_parameter_is_a_linear_layers_own():
    class Borrowed(nn.Module):
        """Uses a layer's weight without calling the layer."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) @ self.layer.weight

    def sharing(model: nn.Module, x: Tensor, **options: object) -> bool:
        space = select_parameters(model)
        spec = KernelSpec(**({"distribution": "lowrank", "draws": 8} | options))
        evaluator = Evaluator(model, space, stacked=True)
        return find_low_rank_passes(evaluator, spec.drawing("weight", space, model), x) is not None

    class PositionsFirst(nn.Module):
        """A layer whose first axis is not the examples' axis, so that draws cannot be stacked along it."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x[:, None].expand(-1, 6, -1).transpose(0, 1).cumsum(0)).prod(0)

    class Grid(nn.Module):
        """A layer that gets a constant with a fixed number of rows for any examples."""

        def __init__(self, rows: int) -> None:
            super().__init__()
            self.layer, self.grid = nn.Linear(2, 3).double(), torch.arange(2.0 * rows).double().reshape(rows, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.layer(self.grid).T

    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert sharing(nn.Linear(3, 2).double(), x)
    assert sharing(nn.Linear(3, 2), x.float(), gamma=1e-6)
    assert not sharing(Borrowed().float(), x.float(), gamma=1e-6)  # its change is below float32's rounding
    assert not sharing(PositionsFirst(), x)
    assert not sharing(Grid(4), x)
    assert not sharing(Grid(5), x)
    assert not sharing(nn.Linear(3, 2).double(), x, distribution="gaussian")
    assert not sharing(Borrowed(), x)
    for name in ("convnet", "tied_weights", "raw_parameters"):
        assert not sharing(case(name).build(), case(name).inputs(4))


def test_the_kernel_is_the_same_with_products_shared_or_not(monkeypatch):
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double(), torch.randn(5, 4).double()
    kernels = {}
    for stacked in (True, False):
        monkeypatch.setattr(
            "nntk_dist.planning.decision.try_stacking", lambda *_, stacked=stacked, **__: StackingTrial(stacked)
        )
        kernels[stacked] = nonlocal_kernel(model, x, gamma=0.3, distribution="lowrank", draws=64).kernel
    torch.testing.assert_close(kernels[True], kernels[False], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 3])
def test_entries_are_uncorrelated_with_the_same_mean_square(rank):
    z = Drawing(LowRank(0.8, rank), 40_000, 4, 9, shapes=((2, 3), (3,))).perturbations(
        range(40_000), dtype=torch.float64
    )
    products = torch.einsum("si,sj->sij", z, z).numpy()
    stderr = products.std(0) / np.sqrt(len(products))
    assert_agrees(products.mean(0), np.eye(9) * 0.8**2 / 2, stderr, len(products))


@pytest.mark.parametrize("design", ["iid", "antithetic"])
@pytest.mark.parametrize("scales", [(), (1.0, 2.0, 0.5, 3.0, 0.1)])
def test_slices_directions_and_products(design, scales):
    some = drawing(2, design=design, scales=scales)
    whole = everything(some)
    for draws, low, high in ((range(3, 9), 0, 1), (range(5), 3, 61), (range(16), 30, 40), (range(2, 4), 63, 1000)):
        part = some.perturbations(draws, low, high, dtype=torch.float64)
        torch.testing.assert_close(part, whole[draws.start : draws.stop, low:high], rtol=1e-13, atol=1e-15)
    d = torch.tensor(scales or (1.0,) * 5, dtype=torch.float64).repeat_interleave(torch.tensor(SIZES))
    v = 2 * whole / d**2 / 0.8**2
    torch.testing.assert_close(some.directions(whole), v, rtol=1e-13, atol=0)
    torch.testing.assert_close(some.direction_products(), v @ v.T, rtol=0, atol=1e-12 * float((v @ v.T).max()))


@pytest.mark.parametrize("draws", [16, 8192])  # differences with their metric, and block means
@pytest.mark.parametrize("gamma_scale", ["absolute", "relative"])
def test_kernel_is_its_definition(gamma_scale, draws):
    """G = mean of Δ·D⁻²·2z/γ², by loops."""
    model, x = case("sign_mlp").build(), case("sign_mlp").inputs(3)
    options = {"distribution": {"name": "lowrank", "rank": 2}, "gamma_scale": gamma_scale, "draws": draws, "blocks": 4}
    spec = KernelSpec(gamma=0.7, **options)
    space = select_parameters(model)
    z = spec.drawing("weight", space, model).perturbations(range(draws), dtype=torch.float64).numpy()
    function, theta = brute_force.function_of_parameters(model, x)
    parameters = [p.detach().numpy() for p in model.parameters()]
    squares = [np.mean(p**2) if gamma_scale == "relative" else 1.0 for p in parameters]
    factor = 2 / 0.7**2 / np.concatenate([np.full(p.size, s) for p, s in zip(parameters, squares, strict=True)])
    few = slice(0, min(draws, 16))
    each = np.stack([(function(theta + one) - function(theta))[:, :, None] * (one * factor) for one in z[few]])
    if draws == 16:
        means = brute_force.block_means(each, np.arange(16) // 4)
        one = nonlocal_kernel(model, x, gamma=0.7, statistic="both", **options)
        assert_equal(one.unbiased, brute_force.unbiased(brute_force.block_products(means, means)))
        assert_equal(one.plugin, brute_force.plugin(means, means))
        assert one.reason.startswith("only output differences do without radial perturbations")
        return
    drawing = spec.drawing("weight", space, model)
    directions = drawing.directions(torch.from_numpy(z[few])).numpy()
    change = np.stack([function(theta + one) - function(theta) for one in z[few]])
    np.testing.assert_allclose(change[..., None] * directions[:, None, None], each, rtol=1e-12)


class Bilinear(nn.Module):
    """φ(x·W·y) of an example (x, y)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.tensor([[0.5, -0.3], [0.2, 0.4]], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        u = torch.einsum("ni,ij,nj->n", x[:, :2], self.weight, x[:, 2:])
        return torch.sign(u) if self.name == "sign" else torch.relu(u)


@pytest.mark.statistical
@pytest.mark.parametrize("name", ["sign", "relu"])
def test_rank_one_against_quadrature(name):
    """x·A·Bᵀ·y = |x||y|·u·v: g = x̂ŷᵀ·(√2/γ)·E[φ(w + c·p)·p], c = γ|x||y|/√2, p = u·v with density K₀(|p|)/π."""
    model, gamma = Bilinear(name), 1.5
    x = torch.tensor([[0.8, 0.6, 1.0, 0.2], [-0.5, 0.9, 0.3, 1.1], [1.0, 0.1, 0.9, -0.4]], dtype=torch.float64)
    gradients, local = [], []
    for a, b in zip(x[:, :2].numpy(), x[:, 2:].numpy(), strict=True):
        w, length = a @ model.weight.detach().numpy() @ b, np.linalg.norm(a) * np.linalg.norm(b)
        reach = gamma * length / np.sqrt(2)

        def integrand(p, w=w, reach=reach):
            u = w + reach * p
            return (np.sign(u) if name == "sign" else max(u, 0.0)) * p * special.k0(abs(p)) / np.pi

        edges = sorted([-40.0, 0.0, -w / reach, 40.0])
        mean = sum(integrate.quad(integrand, *pair)[0] for pair in itertools.pairwise(edges))
        gradients.append(np.sqrt(2) / gamma * mean * np.outer(a, b).ravel() / length)
        local.append((0.0 if name == "sign" else float(w > 0)) * np.outer(a, b).ravel())
    exact = np.stack(gradients) @ np.stack(gradients).T
    one = nonlocal_kernel(model, x, gamma=gamma, distribution="lowrank", draws=1 << 18, blocks=32)
    assert_agrees(one.unbiased, exact, one.stderr, 32)
    assert_power(one.stderr, exact, np.stack(local) @ np.stack(local).T)


@pytest.mark.parametrize("function", [covariance_kernel, averaged_kernel])
def test_other_kernels_are_refused(function):
    with pytest.raises(
        NNTKError, match=r"distribution is 'lowrank', which is not radial; allowed for kind .*: gaussian"
    ):
        function(case("relu_mlp").build(), case("relu_mlp").inputs(3), gamma=1.0, distribution="lowrank")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "autodiff"}, r"estimator is 'autodiff'; allowed for distribution lowrank, .*: auto, weight"),
        ({"design": "orthogonal"}, r"design is 'orthogonal'; allowed for distribution lowrank: iid, antithetic"),
    ],
)
def test_what_needs_radial_laws_is_refused(options, message):
    with pytest.raises(NNTKError, match=message):
        KernelSpec(distribution="lowrank", **options)
