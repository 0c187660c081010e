"""Error against cost: what every estimator pays for a kernel of a network with 100,000 parameters.

A ladder of numbers of draws under several seeds each, the error ‖K − K*‖/‖K*‖ against a long run K* of the best
estimator (other seeds, antithetic, in two halves whose difference tells its error), a law of the error fitted to the
ladder, and from that law the draws, forward equivalents and seconds at an error of 5 %. If 5 % lies beyond the ladder,
the law is extrapolated.

Forward equivalents are evaluations of the network on all examples: 1 at θ for estimators that take differences; 1 a
draw for `weight` and `activation`; 1 + 2C a draw for `autodiff`, which makes a backward pass for each of C outputs, at
twice the cost of a forward pass. Seconds cover features and contraction, without error bars, which `weight` can
least afford; neither counts the choice of the estimator, made once.

Axes: n examples, S draws, C outputs, P parameters, T seeds.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import optimize
from sklearn.datasets import load_digits
from torch import Tensor, nn

from nntk_dist import local_kernel
from nntk_dist.models.builders import build_model
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.planning.decision import decide
from nntk_dist.planning.feature_maps import make_feature_map
from nntk_dist.sampling.designs import GROUP_SIZES
from nntk_dist.spec import KernelSpec
from nntk_dist.statistics.standard_errors import relative_distance
from nntk_dist.statistics.tile_estimates import tile_estimates
from scripts.studies.cells import Answer, Cell
from tests.harness.tools import all_rows

TARGET, COARSE = 0.05, 0.2
GAMMA = 0.05
BLOCKS = 8
# Fewer examples for many outputs, because block means of every example and output are in memory.
NUM_EXAMPLES = {1: 32, 10: 16}
WIDTHS = (300, 300)
_REFERENCE_SEED = 1_000_000
_MOST_GRADIENTS = 32
_BEST = {"relu": "autodiff", "sign": "activation"}

Ladder = dict[int, int]  # draws -> seeds


@dataclass(frozen=True)
class Effort:
    """Ladders of each estimator, and draws of the reference by activation and outputs."""

    ladders: dict[str, Ladder]
    reference: dict[str, int]

    def ladder(self, estimator: str, num_outputs: int) -> Ladder:
        """The ladder of an estimator; for gradients it ends early if many outputs make products expensive."""
        highest = _MOST_GRADIENTS if estimator == "autodiff" and num_outputs > 1 else math.inf
        return {draws: seeds for draws, seeds in self.ladders[estimator].items() if draws <= highest}


FULL = Effort(
    {
        "autodiff": {8: 16, 16: 12, 32: 8, 64: 6, 128: 4},
        "activation": {256: 8, 512: 6, 1024: 6, 2048: 4},
        "weight": {64: 8, 128: 6, 256: 6, 512: 4},
    },
    {"relu-1": 1024, "relu-10": 512, "sign-1": 24_576, "sign-10": 12_288},
)
QUICK = Effort(
    {"autodiff": {8: 4, 32: 3}, "activation": {128: 3, 512: 2}, "weight": {64: 3, 256: 2}},
    {"relu-1": 512, "sign-1": 8192},
)


def cells(*, quick: bool) -> list[Cell]:
    """A cell for each network."""
    effort = QUICK if quick else FULL
    result = []
    for key, draws in effort.reference.items():
        activation, outputs = key.split("-")
        ladders = {name: effort.ladder(name, int(outputs)) for name in (_BEST[activation], "weight")}
        settings = {
            "activation": activation,
            "num_outputs": int(outputs),
            "widths": list(WIDTHS),
            "gamma": GAMMA,
            "blocks": BLOCKS,
            "examples": NUM_EXAMPLES[int(outputs)],
            "reference_draws": draws,
            "ladders": {name: {str(s): count for s, count in ladder.items()} for name, ladder in ladders.items()},
        }
        result.append(Cell(key, settings, partial(_study, activation, int(outputs), draws, effort)))
    return result


def digits(count: int) -> Tensor:
    """The first of scikit-learn's handwritten digits, one mean and deviation for all pixels."""
    images = load_digits().data
    return torch.from_numpy((images - images.mean()) / images.std()).float()[:count]


def network(activation: str, num_outputs: int) -> nn.Module:
    """A perceptron of PyTorch's initialisation."""
    arguments = {"widths": list(WIDTHS), "activation": activation}
    model = build_model("mlp", arguments, input_shape=(64,), num_outputs=num_outputs, seed=0)
    return prepare_model(model, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class Estimate:
    """One kernel, and the seconds that it took."""

    plugin: Tensor
    unbiased: Tensor
    feature_seconds: float
    seconds: float


@dataclass(frozen=True)
class Estimating:
    """A feature map made once, for any number of seeds."""

    features: Any  # a feature map whose draws can be replaced
    spec: KernelSpec
    x: Tensor

    @classmethod
    def of(cls, model: nn.Module, x: Tensor, spec: KernelSpec) -> "Estimating":
        decision = decide(model, x, spec, batch=len(x))
        return cls(make_feature_map(model, x, spec, decision), spec, x)

    def under(self, seed: int) -> Estimate:
        """The kernel under another seed, without error bars."""
        began = time.perf_counter()
        drawn = replace(self.features, drawing=replace(self.features.drawing, seed=seed))
        rows = all_rows(drawn, self.x)
        featured = time.perf_counter()
        result = tile_estimates(drawn, [(rows, rows)], self.spec.meeting, None, self.spec.scale)
        done = time.perf_counter()
        return Estimate(result["plugin"], result["unbiased"], featured - began, done - began)


def forwards(estimator: str, draws: int, num_outputs: int) -> int:
    """Forward equivalents of S draws."""
    return draws * (1 + 2 * num_outputs) if estimator == "autodiff" else draws + 1


def _study(activation: str, num_outputs: int, reference_draws: int, effort: Effort) -> Answer:
    """Everything about one network."""
    model, x = network(activation, num_outputs), digits(NUM_EXAMPLES[num_outputs])
    best = _BEST[activation]
    options: dict[str, Any] = {
        "estimator": best,
        "design": "antithetic",
        "contraction": "means",
        "variance_reduction": "none",
    }
    estimating = Estimating.of(model, x, KernelSpec(gamma=GAMMA, draws=reference_draws // 2, blocks=BLOCKS, **options))
    halves = [estimating.under(_REFERENCE_SEED + half) for half in range(2)]
    truth = 0.5 * (halves[0].unbiased + halves[1].unbiased)
    reference_error = 0.5 * relative_distance(halves[0].unbiased, halves[1].unbiased)
    local = None if activation == "sign" else relative_distance(local_kernel(model, x).double(), truth)
    methods = []
    for estimator in (best, "weight"):
        for design in ("iid", "antithetic"):
            # `auto` keeps factors here, which take less memory; block means are faster.
            contraction = "means" if estimator == "activation" else "auto"
            options = {
                "estimator": estimator,
                "design": design,
                "contraction": contraction,
                "variance_reduction": "none",
            }
            spec = KernelSpec(gamma=GAMMA, draws=64, blocks=BLOCKS, **options)
            points = _climb(model, x, spec, effort.ladder(estimator, num_outputs), truth)
            methods += _methods(estimator, design, points, num_outputs, reference_error)
    return {
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "reference": {
            "estimator": best,
            "draws": reference_draws,
            "relative_error": reference_error,
            "seconds": sum(half.seconds for half in halves),
        },
        "local_distance": local,
        "methods": methods,
    }


def _climb(model: nn.Module, x: Tensor, spec: KernelSpec, ladder: Ladder, truth: Tensor) -> list[Answer]:
    """Errors and seconds on every rung that fills the blocks, root mean squares and medians over its seeds."""
    points = []
    for draws, num_seeds in ladder.items():
        if draws % _unit(spec.design):
            continue
        estimating = Estimating.of(model, x, replace(spec, draws=draws))
        estimates = [estimating.under(seed) for seed in range(num_seeds)]
        points.append(
            {
                "draws": draws,
                "seeds": num_seeds,
                "feature_seconds": float(np.median([one.feature_seconds for one in estimates])),
                "seconds": float(np.median([one.seconds for one in estimates])),
                "unbiased": _root_mean_square([relative_distance(one.unbiased, truth) for one in estimates]),
                "plugin": _root_mean_square([relative_distance(one.plugin, truth) for one in estimates]),
            }
        )
    return points


def _unit(design: str) -> int:
    """Draws of one group a block."""
    return BLOCKS * GROUP_SIZES[design]


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(np.mean(np.square(values)))


def _methods(
    estimator: str, design: str, points: list[Answer], num_outputs: int, reference_error: float
) -> list[Answer]:
    """The estimator with each statistic; `plugin` only for `weight`, because its bias decides the cost."""
    result = []
    for statistic in ("unbiased", "plugin") if estimator == "weight" else ("unbiased",):
        own = [{**point, "error": point[statistic]} for point in points]
        for point in own:
            point["forwards"] = forwards(estimator, point["draws"], num_outputs)
            del point["unbiased"], point["plugin"]
        law = fit_error(own, reference_error, with_signal=estimator != "weight")
        draws = draws_needed(law, design, TARGET)
        result.append(
            {
                "estimator": estimator,
                "design": design,
                "statistic": statistic,
                "points": own,
                "law": {"noise": law.noise, "signal": law.signal},
                "at_target": {
                    "draws": draws,
                    "forwards": forwards(estimator, draws, num_outputs),
                    "seconds": _seconds(own[-1], draws),
                    "extrapolated": draws > own[-1]["draws"],
                },
            }
        )
    return result


def draws_needed(law: "ErrorLaw", design: str, error: float) -> int:
    """Draws for an error by the law, in whole groups in all blocks."""
    return _unit(design) * math.ceil(law.draws_at(error) / _unit(design))


def _seconds(longest: Answer, draws: int) -> float:
    """Features for `draws` draws, and the contraction at the most draws measured: too little for `weight`, whose metric
    grows.
    """
    contraction = longest["seconds"] - longest["feature_seconds"]
    return longest["feature_seconds"] / longest["draws"] * draws + contraction


@dataclass(frozen=True)
class ErrorLaw:
    """error² = noise²/S² + signal²/S: products of noise with noise, and of noise with the gradient itself."""

    noise: float
    signal: float

    def error(self, draws: float) -> float:
        """The error of S draws."""
        return math.hypot(self.noise / draws, self.signal / math.sqrt(draws))

    def draws_at(self, error: float) -> float:
        """S at which the error is so large: the root of error²·S² = signal²·S + noise²."""
        square = self.signal**2
        return (square + math.sqrt(square**2 + 4 * (error * self.noise) ** 2)) / (2 * error**2)


def fit_error(points: Sequence[Answer], reference_error: float, *, with_signal: bool) -> ErrorLaw:
    """Non-negative least squares of relative residuals, after the reference's own error has been taken off.

    Without a signal term if noise is much larger on the whole ladder: the draws that follow are then rather too few.
    """
    s, errors = (np.array([point[name] for point in points], dtype=float) for name in ("draws", "error"))
    squares = np.maximum(errors**2 - reference_error**2, 1e-3 * errors**2)
    terms = [s**-2, 1 / s] if with_signal else [s**-2]
    weights = np.sqrt([point["seeds"] for point in points])
    coefficients = optimize.nnls(np.stack(terms, axis=1) * (weights / squares)[:, None], weights)[0]
    noise, signal = (*coefficients, 0.0)[:2]
    return ErrorLaw(math.sqrt(noise), math.sqrt(signal))
