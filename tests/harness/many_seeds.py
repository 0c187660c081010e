"""One kernel of a single unit under many seeds, to test unbiasedness and coverage.

Differences go through the public functions. Gradients would take a forward and a backward pass for each draw. For a
unit they are φ'(θ·x + U^{1/P} z·x) x, so the features of all draws are computed directly in one step (a test compares
them with the library's own). Everything after the features is the library's.

Axes: T seeds, S draws, R blocks, n examples, P parameters.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from nntk_dist.estimators.gradients import GradientFeatures
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.planning.decision import plan_for
from nntk_dist.planning.feature_maps import make_feature_map
from nntk_dist.sampling.draws import Drawing
from nntk_dist.spec import KernelSpec
from tests.harness.tools import estimates_of, under_seeds
from tests.oracles import closed_forms, radial
from tests.oracles.cases import unit_module
from tests.oracles.statistics import assert_agrees

Array = np.ndarray
SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": torch.ones_like,
    "quadratic": lambda u: u,
    "relu": lambda u: (u > 0).to(u.dtype),
}
CLOSED_FORMS = {
    "nonlocal": closed_forms.nonlocal_kernel,
    "covariance": closed_forms.covariance_kernel,
    "averaged": closed_forms.averaged_kernel,
}


@dataclass(frozen=True)
class Problem:
    """A unit φ(θ·x) at a range as large as its margins, so that draws flip it often."""

    unit: str
    num_parameters: int
    kind: str = "nonlocal"
    gamma: float = 1.5
    distribution: str = "gaussian"

    @property
    def theta(self) -> Array:
        """A vector of length 1."""
        direction = np.linspace(1.0, -0.5, self.num_parameters)
        return direction / np.linalg.norm(direction)

    @property
    def x(self) -> Array:
        """Examples of length 1 with θ·x = 0.9, −0.6 and 0.3; z·x has the standard deviation γ/√2."""
        margins = np.array([[0.9], [-0.6], [0.3]])
        across = np.random.default_rng(0).normal(size=(3, self.num_parameters))
        across -= (across @ self.theta)[:, None] * self.theta
        across /= np.linalg.norm(across, axis=1, keepdims=True)
        return margins * self.theta + np.sqrt(1.0 - margins**2) * across

    def model(self) -> nn.Module:
        return unit_module(self.unit, torch.from_numpy(self.theta))

    def exact(self) -> Array:
        """The closed form, or the quadrature if the law matters."""
        if self.distribution != "gaussian" and self.unit in ("sign", "relu"):
            law = radial.radius_law(self.distribution, self.gamma, self.num_parameters)
            if self.kind == "averaged":
                return radial.averaged_relu_kernel(self.theta, self.x, law)
            kernel = {"nonlocal": radial.nonlocal_kernel, "covariance": radial.covariance_kernel}[self.kind]
            return kernel(self.unit, self.theta, self.x, law)
        return CLOSED_FORMS[self.kind](self.unit, self.theta, self.x, self.x, self.gamma)

    def local(self) -> Array | None:
        """The ordinary kernel, if theory says that it differs from the nonlocal one."""
        if self.kind == "nonlocal" and self.unit in ("linear", "quadratic"):
            return None
        if self.unit == "linear":
            return None
        return closed_forms.local_kernel(self.unit, self.theta, self.x, self.x)


@dataclass(frozen=True)
class Runs:
    """Estimates under T seeds, (T, n, n) each; `centre` is the estimate that the standard errors describe."""

    centre: Array
    stderr: Array
    plugin: Array


def runs(problem: Problem, estimator: str, seeds: range, *, draws: int, blocks: int = 8, design: str = "iid") -> Runs:
    """The kernel under each of the seeds."""
    spec = KernelSpec(
        problem.kind,
        problem.gamma,
        problem.distribution,
        estimator=estimator,
        design=design,
        draws=draws,
        blocks=blocks,
    )
    results = (_by_differences if estimator == "weight" else _by_gradients)(problem, spec, seeds)
    return Runs(*(torch.stack(parts).numpy() for parts in zip(*results, strict=True)))


Statistics = tuple[Tensor, Tensor, Tensor]


def _by_differences(problem: Problem, spec: KernelSpec, seeds: Iterable[int]) -> Iterator[Statistics]:
    for estimate in under_seeds(problem.model(), torch.from_numpy(problem.x), spec, seeds):
        unbiased, stderr, plugin = estimate.unbiased, estimate.stderr, estimate.plugin
        assert stderr is not None
        if spec.kind == "covariance":
            yield estimate.kernel, stderr, estimate.kernel
        else:
            assert unbiased is not None
            assert plugin is not None
            yield unbiased, stderr, plugin


def _by_gradients(problem: Problem, spec: KernelSpec, seeds: Iterable[int]) -> Iterator[Statistics]:
    features = gradient_features(problem, spec)
    assert features.drawing is not None
    for seed in seeds:
        drawing = replace(features.drawing, seed=seed)
        rows = filled_in(problem, drawing, features.draws_per_slot)
        result = estimates_of(replace(features, drawing=drawing), rows, rows, replace(spec, seed=seed))
        yield result.get("unbiased", result["plugin"]), result["stderr"], result["plugin"]


def gradient_features(problem: Problem, spec: KernelSpec) -> GradientFeatures:
    """The library's feature map of the problem, made once for all seeds; `autodiff` is known to be valid here."""
    model, x = prepare_model(problem.model(), dtype=torch.float64, device="cpu"), torch.from_numpy(problem.x)
    assert isinstance(spec.draws, int)
    decision = plan_for("autodiff", model, x, spec)
    features = make_feature_map(model, x, spec, decision)
    assert isinstance(features, GradientFeatures)
    return features


def filled_in(problem: Problem, drawing: Drawing, draws_per_slot: int) -> dict[str, Tensor]:
    """Compute what `GradientFeatures.compute` returns for a unit, in one step: (n, S / draws_per_slot, 1, P)."""
    everything = range(drawing.num_draws)
    z = drawing.perturbations(everything, dtype=torch.float64) * drawing.shrinkage(everything)[:, None]
    x = torch.from_numpy(problem.x)
    slopes = SLOPES[problem.unit](x @ (torch.from_numpy(problem.theta) + z).T)
    return {"dense": slopes.unflatten(1, (-1, draws_per_slot)).mean(2)[:, :, None, None] * x[:, None, None, :]}


def check(values: Array, expected: Array) -> Array:
    """Check that the mean over seeds agrees with the expected value at a corrected 0.1 %; return its standard error."""
    stderr = values.std(0, ddof=1) / np.sqrt(len(values))
    assert_agrees(values.mean(0), expected, stderr, len(values), rounding=1e-12)
    return stderr
