"""The noise floor of differences: against evaluations in float32 and float64, known answers, and when it warns.

Axes: s draws, n examples, C outputs, P parameters.
"""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from nntk_dist import (
    BlackBox,
    NNTKClassifier,
    NNTKError,
    NNTKWarning,
    averaged_kernel,
    covariance_kernel,
    local_kernel,
    nonlocal_kernel,
)
from nntk_dist.models.evaluation import Evaluator, prepare_model
from nntk_dist.models.parameters import select_parameters
from nntk_dist.planning.noise_floor import NoiseFloor, probe_noise
from nntk_dist.planning.stacking import StackingTrial
from nntk_dist.spec import KernelSpec
from tests.oracles.cases import case, unit_module

WARNING = (
    r"rounding in float32 on cpu is [\d.e+-]+ of the differences f\(x; θ\+z\) − f\(x; θ\) at gamma 1e-06 \(harmless: "
    r"up to 0\.01\), and adds noise to the kernel; take a larger gamma or dtype float64"
)


class OneNumber(nn.Module):
    """f(x; θ) = θ for every x."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([value]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.theta.expand(len(x))


EYE = torch.eye(2)


class Single(nn.Linear):
    """Runs only in float32: a constant that is no buffer has that type."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) @ EYE


def floor_of(model: nn.Module, x: torch.Tensor, *, dtype=torch.float32, columns=None, still=(), **options):
    prepared = prepare_model(model, dtype=dtype, device="cpu")
    space = select_parameters(prepared)
    drawing = KernelSpec(**options).drawing("weight", space, prepared)
    x = x.to(dtype) if x.is_floating_point() else x
    columns = range(Evaluator(prepared, space).base(x).shape[1]) if columns is None else columns
    return probe_noise(Evaluator(prepared, space), drawing, x, columns, still=still)


def perturbations(model: nn.Module, spec: KernelSpec) -> torch.Tensor:
    """The first eight of the run, as float32 runs use them."""
    drawing = spec.drawing("weight", select_parameters(model), model)
    return drawing.perturbations(range(8), dtype=torch.float32)


def by_length(model: nn.Module, spec: KernelSpec) -> torch.Tensor:
    """The weights of these perturbations: 1/|u|², where z is u times a scale for each tensor."""
    space = select_parameters(model)
    z = spec.drawing("weight", space, model).perturbations(range(8), dtype=torch.float64)
    if spec.gamma_scale == "relative":
        parts = zip(z.split(space.sizes, dim=1), space.values(model).values(), strict=True)
        z = torch.cat([part / value.double().square().mean().sqrt() for part, value in parts], dim=1)
    return z.norm(dim=1) ** -2


def by_hand(
    model: nn.Module, x: torch.Tensor, z: torch.Tensor, weights: torch.Tensor, still: int = 0
) -> tuple[float, ...]:
    """Compute (change, noise) by overwriting the parameters draw by draw, in both types; the first `still` coordinates
    of z are set to 0.
    """
    single, exact = copy.deepcopy(model).float(), copy.deepcopy(model).float().double()
    theta = parameters_to_vector(single.parameters()).detach()
    inputs = (x.float(), x.float().double()) if x.is_floating_point() else (x, x)
    changes, errors = [], []
    z = torch.cat([torch.zeros_like(z[:, :still]), z[:, still:]], dim=1)
    with torch.no_grad():
        base, exact_base = single(inputs[0]), exact(inputs[1])
        for one in z:
            vector_to_parameters(theta + one, single.parameters())
            vector_to_parameters(theta.double() + one.double(), exact.parameters())
            change = exact(inputs[1]) - exact_base
            changes.append(change)
            errors.append((single(inputs[0]) - base).double() - change)
    squares = (torch.stack(each).square().mean((1, 2)) for each in (changes, errors))
    return tuple(float((weights @ each / weights.sum()).sqrt()) for each in squares)


@pytest.mark.parametrize("name", ["relu_mlp", "deep_sign_mlp", "attention", "embedding", "batch_norm"])
@pytest.mark.parametrize("gamma", [1e-2, 1e-5])
@pytest.mark.parametrize("gamma_scale", ["absolute", "relative"])
def test_it_is_the_error_of_float32_against_float64(name, gamma, gamma_scale):
    entry = case(name)
    model, x = entry.build().float(), entry.inputs(8)
    spec = KernelSpec(gamma=gamma, seed=3, gamma_scale=gamma_scale)
    change, noise = by_hand(model, x, perturbations(model, spec), by_length(model, spec))
    floor = floor_of(model, x, gamma=gamma, seed=3, gamma_scale=gamma_scale)
    assert floor.measured
    assert floor.change == pytest.approx(change, rel=1e-9)
    assert floor.noise == pytest.approx(noise, rel=1e-6)
    assert floor.ratio == pytest.approx(noise / change, rel=1e-6)


def test_one_number_near_one_is_rounded_to_its_grid():
    """At f = θ = 1, z is rounded to multiples of 2^-24 below one and of 2^-23 above it, as in NumPy."""
    spec = KernelSpec(gamma=1e-5)
    z = perturbations(OneNumber(1.0), spec).numpy()[:, 0]
    error = (np.float32(1.0) + z).astype(np.float64) - 1.0 - z.astype(np.float64)
    floor = floor_of(OneNumber(1.0), torch.zeros(3, 1), gamma=1e-5)
    weights = by_length(OneNumber(1.0), spec).numpy()
    weights /= weights.mean()
    assert floor.noise == pytest.approx(np.sqrt(np.mean(weights * error**2)), rel=1e-9)
    assert floor.change == pytest.approx(np.sqrt(np.mean(weights * z.astype(np.float64) ** 2)), rel=1e-9)


def test_where_every_perturbation_is_lost_the_noise_is_the_signal():
    assert floor_of(OneNumber(1.0), torch.zeros(3, 1), gamma=1e-10).ratio == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("name", ["tanh_mlp", "layer_norm", "convnet"])
def test_noise_over_signal_goes_like_one_over_gamma(name):
    entry = case(name)
    gammas = [1e-2, 1e-3, 1e-4, 1e-5]
    scaled = [gamma * floor_of(entry.build(), entry.inputs(16), gamma=gamma).ratio for gamma in gammas]
    assert max(scaled) < 2 * min(scaled), scaled
    assert 1e-8 < scaled[0] < 1e-5  # some units of float32's 6e-8


def test_what_float64_cannot_be_compared_with_is_estimated_from_its_unit():
    entry = case("tanh_mlp")
    model, x = entry.build(), entry.inputs(8)
    floor = floor_of(model, x, dtype=torch.float64, gamma=1e-3)
    size = float(model(x).detach().square().mean().sqrt())
    assert not floor.measured
    assert floor.noise == pytest.approx(math.sqrt(2) * 2.0**-52 * size, rel=1e-2)
    assert floor_of(model, x, dtype=torch.float64, gamma=1e-5).ratio == pytest.approx(100 * floor.ratio, rel=0.05)


def test_a_black_box_is_float64_in_any_run():
    x = torch.ones(2, 3)
    floor = floor_of(BlackBox(lambda params, x: x @ params, np.ones(3)), x, gamma=1e-3)
    assert not floor.measured
    assert floor.noise == pytest.approx(math.sqrt(2) * 2.0**-52 * 3.0, rel=1e-2)


def test_outputs_that_no_draw_changes_have_no_ratio_and_no_warning_of_noise():
    model = unit_module("sign", torch.tensor([1.0, 2.0])).float()
    x = torch.tensor([[1.0, 1.0], [3.0, 1.0]])
    floor = floor_of(model, x, gamma=1e-6)
    assert (floor.change, floor.noise) == (0.0, 0.0)
    assert math.isnan(floor.ratio)
    for dtype in (torch.float32, torch.float64):
        with pytest.warns(NNTKWarning, match="nothing is known of the kernel") as caught:
            estimate = covariance_kernel(model, x, gamma=1e-6, dtype=dtype)
        assert not any("rounding" in str(each.message) for each in caught)
        assert math.isnan(estimate.probes.noise)


def test_nothing_but_noise_is_infinite():
    assert NoiseFloor(0.0, 1e-9, measured=True).ratio == math.inf
    assert math.isnan(NoiseFloor(0.0, 1e-16, measured=False).ratio)


def test_asked_outputs_and_moving_parameters_alone_count():
    entry = case("relu_mlp")
    model, x = entry.build(), entry.inputs(8)
    parts = [floor_of(model, x, gamma=0.1, columns=(c,)) for c in range(3)]
    whole = floor_of(model, x, gamma=0.1)
    assert whole.change == pytest.approx(math.sqrt(sum(part.change**2 for part in parts) / 3))
    names = [name for name, _ in model.named_parameters()]
    assert floor_of(model, x, gamma=0.1, still=names).change == 0.0
    readout = floor_of(model, x, gamma=0.1, still=names[:2])
    model, spec = model.float(), KernelSpec(gamma=0.1)
    z, weights = perturbations(model, spec), by_length(model, spec)
    assert readout.change == pytest.approx(by_hand(model, x, z, weights, 4 * 6 + 6)[0], rel=1e-9)


def test_a_model_of_float32_alone_is_not_probed_and_not_refused():
    torch.manual_seed(0)
    model, x = Single(4, 2), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert floor_of(model, x, gamma=0.1) is None
    assert covariance_kernel(model, x, gamma=0.1).probes.noise is None


def test_an_output_that_is_not_finite_under_perturbation_is_not_probed():
    class Root(OneNumber):
        def forward(self, x):
            return super().forward(x).sqrt()

    assert floor_of(Root(1e-3), torch.zeros(2, 1), gamma=1.0) is None


def test_differences_below_rounding_are_warned_of_and_the_remedies_work():
    model, x = case("tanh_mlp").build().float(), case("tanh_mlp").inputs(6).float()
    with pytest.warns(NNTKWarning, match=WARNING + "$") as caught:
        estimate = covariance_kernel(model, x, gamma=1e-6)
    assert caught[0].filename == __file__
    assert estimate.probes.noise > 0.01
    assert str(caught[0].message) == estimate.probes.cautions[0]
    with pytest.warns(NNTKWarning, match=WARNING + " or estimator autodiff, if the model has no jumps$"):
        nonlocal_kernel(model, x, gamma=1e-6, estimator="weight", draws=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert covariance_kernel(model, x, gamma=1e-2).probes.noise < 0.01
        assert covariance_kernel(model, x, gamma=1e-6, dtype=torch.float64).probes.noise < 0.01
        gradients = nonlocal_kernel(model, x, gamma=1e-6)
        assert averaged_kernel(model, x, gamma=1e-6).probes.noise == pytest.approx(gradients.probes.noise)
        local_kernel(model, x)
    assert gradients.estimator == "autodiff"
    assert gradients.probes.noise > 0.01
    assert gradients.probes.cautions == ()


def test_draws_of_which_many_are_lost_are_warned_of(monkeypatch):
    """|z| = R·u^{1/(1−α)}: at α = 0.8 one in ten draws moves float32 parameters by less than ten of their units.

    Evaluated stacked: in turn, a model that does not move has no rounding error, and its difference is exactly 0.
    """
    monkeypatch.setattr("nntk_dist.planning.decision.try_stacking", lambda *_, **__: StackingTrial(stacked=True))
    model, x = case("tanh_mlp").build().float(), case("tanh_mlp").inputs(6).float()
    options = {"distribution": {"name": "fractional", "alpha": 0.8}, "estimator": "weight", "draws": 64}
    with pytest.warns(NNTKWarning, match="rounding in float32"):
        estimate = nonlocal_kernel(model, x, gamma=0.3, seed=1, **options)
    assert estimate.probes.noise > 0.05


@pytest.mark.filterwarnings("ignore:rounding in float32")
def test_directions_that_overflow_are_refused():
    model, x = case("tanh_mlp").build().float(), case("tanh_mlp").inputs(6).float()
    options = {"distribution": {"name": "fractional", "alpha": 0.97}, "estimator": "weight", "draws": 64}
    with pytest.raises(NNTKError, match=r"overflow float32; .*dtype float64"):
        nonlocal_kernel(model, x, gamma=0.3, **options)
    del options["estimator"]
    with pytest.raises(NNTKError, match=r"overflow float32; .*dtype float64$"):
        covariance_kernel(model, x, gamma=0.3, **options)


@pytest.mark.parametrize("stacked", [True, False])
def test_noise_at_the_threshold_does_to_a_covariance_kernel_what_the_warning_says(monkeypatch, stacked):
    """Its diagonal is inflated by the square of the noise, which is visible if the noise is large."""
    monkeypatch.setattr("nntk_dist.planning.decision.try_stacking", lambda *_, **__: StackingTrial(stacked))
    model, x = case("tanh_mlp").build().float(), case("tanh_mlp").inputs(6).float()
    with pytest.warns(NNTKWarning, match="rounding in float32"):
        rough = covariance_kernel(model, x, gamma=1e-7, draws=512)
    fine = covariance_kernel(model.double(), x.double(), gamma=1e-7, draws=512)
    inflation = float(rough.kernel.double().trace() / fine.kernel.trace()) - 1.0
    assert 0.3 * rough.probes.noise**2 < inflation < 3.0 * rough.probes.noise**2


def test_estimator_activation_warns_too():
    model, x = case("sign_mlp").build().float(), case("sign_mlp").inputs(6).float()
    with torch.no_grad():  # so large that no sign changes, and the readout is not perturbed: nothing moves
        model[0].bias.fill_(50.0)
    with pytest.warns(NNTKWarning, match="nothing is known of the kernel") as caught:
        estimate = nonlocal_kernel(model, x, gamma=1e-3, estimator="activation", draws=16, variance_reduction="none")
    assert not any("rounding" in str(each.message) for each in caught)
    assert math.isnan(estimate.probes.noise)
    smooth = case("tanh_mlp").build().float()
    with pytest.warns(NNTKWarning, match="rounding in float32 on cpu"):
        nonlocal_kernel(smooth, x, gamma=1e-7, estimator="activation", draws=16)


def test_scikit_learn_estimators_warn():
    x = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    model = case("tanh_mlp").build().float()
    fitted = NNTKClassifier(model, gamma=1e-7, estimator="weight", draws=16)
    with pytest.warns(NNTKWarning, match="rounding in float32") as caught:
        fitted.fit(x, np.arange(12) % 3)
    assert caught[0].filename == __file__
