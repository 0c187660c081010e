"""Kernel ridge regression with the nonlocal kernel of a model, by scikit-learn's conventions.

`fit` computes the train kernel once and keeps the train features, so that `predict` is the same kernel (the same
draws) between new examples and those. Everything is held in memory; for what does not fit, use the pipeline. No
probabilities are offered: the scores of ridge regression on one-hot targets are none.

Axes: n train examples, m new examples, T target columns (one for each class), C outputs of the model.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float64
from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from nntk_dist.analysis.dense_regression import fit_ridge_path
from nntk_dist.errors import NNTKError, NNTKWarning
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.planning.decision import Decision, decide
from nntk_dist.planning.feature_maps import make_feature_map
from nntk_dist.products.features import FeatureMap, Rows
from nntk_dist.runtime.precision import full_precision
from nntk_dist.spec import KernelSpec
from nntk_dist.statistics.tile_estimates import tile_estimates
from nntk_dist.weighting.options import Weighting, as_weighting
from nntk_dist.weighting.scores.base import ScoreFunction

Array = np.ndarray
ModelOrBuilder = nn.Module | Callable[[int, int], nn.Module]


@dataclass(frozen=True)
class TrainedKernel:
    """The kernel `plugin` of a model with everything that its train examples decide: estimator, draws, features."""

    spec: KernelSpec
    decision: Decision
    features: FeatureMap
    rows: Rows
    batch: int
    num_train: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @full_precision()
    def gram(self) -> Float64[Array, "n n"]:
        """Train by train, (n·C)² for `full`; bitwise symmetric."""
        return self._meet(self.rows).cpu().numpy()

    @full_precision()
    def cross(self, inputs: Array) -> Float64[Array, "m n"]:
        """New examples by train."""
        x = self._tensor(inputs)
        ids = torch.arange(self.num_train, self.num_train + len(x), device=self.device)
        return self._meet(self._features_of(x, ids)).cpu().numpy()

    @full_precision()
    def outputs(self, inputs: Array) -> Float64[Array, "m C"]:
        """f(x; θ)."""
        return self.features.outputs(self._tensor(inputs), batch=self.batch).double().cpu().numpy()

    def _tensor(self, inputs: Array) -> Tensor:
        if inputs.shape[1:] != self.shape:
            raise NNTKError(f"X has examples of shape {inputs.shape[1:]}; allowed: {self.shape}, as fitted")
        return torch.from_numpy(inputs).to(self.device, self.dtype, copy=True)  # a model may write to its input

    def _features_of(self, x: Tensor, ids: Tensor) -> Rows:
        everything = range(self.features.num_draws)
        return self.features.compute(x, ids, everything, self.features.columns, batch=self.batch)

    def _meet(self, rows: Rows) -> Tensor:
        return tile_estimates(self.features, [(rows, self.rows)], self.spec.meeting, None, self.spec.scale)["plugin"]


@full_precision()
def train_kernel(model: nn.Module, inputs: Array, spec: KernelSpec, *, batch: int) -> TrainedKernel:
    """Decide the estimator on the train examples and compute their features, at the model's dtype and device."""
    first = next(model.parameters(), torch.empty(0))
    x = torch.from_numpy(inputs).to(first.device, first.dtype, copy=True)  # a model may write to its input
    batch = min(batch, len(x))
    prepared = prepare_model(model, dtype=first.dtype, device=first.device)
    decision = decide(prepared, x, spec, batch=batch)
    for caution in () if decision.probes is None else decision.probes.cautions:
        warnings.warn(caution, NNTKWarning, stacklevel=5)  # where `fit` was called
    features = make_feature_map(prepared, x, spec, decision)
    ids = torch.arange(len(x), device=first.device)
    rows = features.compute(x, ids, range(features.num_draws), features.columns, batch=batch)
    shape = tuple(x.shape[1:])
    return TrainedKernel(spec, decision, features, rows, batch, len(x), shape, first.dtype, first.device)


class _NonlocalRidge(BaseEstimator):
    """What regressor and classifier share; their docstrings say what it means."""

    def __init__(
        self,
        model: ModelOrBuilder,
        *,
        gamma: float = 0.05,
        ridge: float | Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
        center_outputs: bool = False,
        distribution: Any = "gaussian",
        gamma_scale: str = "absolute",
        estimator: str = "auto",
        design: str = "iid",
        draws: int | str = "auto",
        blocks: int = 8,
        outputs: str | int = "trace",
        weighting: str | Mapping[str, Any] | Weighting | ScoreFunction | None = None,
        parameters: Sequence[str] = ("*",),
        seed: int = 0,
        batch: int = 256,
    ) -> None:
        self.model = model
        self.gamma = gamma
        self.ridge = ridge
        self.center_outputs = center_outputs
        self.distribution = distribution
        self.gamma_scale = gamma_scale
        self.estimator = estimator
        self.design = design
        self.draws = draws
        self.blocks = blocks
        self.outputs = outputs
        self.weighting = weighting
        self.parameters = parameters
        self.seed = seed
        self.batch = batch

    def _fit(self, X: Array, targets: Float64[Array, "n T"], labels: Array | None = None) -> None:
        """Kernel and solutions; a weighting by the loss compares with the labels, or with the targets themselves."""
        spec = KernelSpec(
            gamma=self.gamma,
            distribution=self.distribution,
            gamma_scale=self.gamma_scale,
            estimator=self.estimator,
            statistic="plugin",
            design=self.design,
            draws=self.draws,
            blocks=self.blocks,
            outputs=self.outputs,
            weighting=_with_targets(as_weighting(self.weighting), targets if labels is None else labels),
            parameters=self.parameters,
            seed=self.seed,
        )
        ridges = _ridges(self.ridge)
        self.kernel_ = train_kernel(self._module(X, targets.shape[1]), X, spec, batch=self.batch)
        offset = self.kernel_.outputs(X) if self.center_outputs else None
        self.path_ = fit_ridge_path(self.kernel_.gram(), targets, ridges, offset=offset)
        self.ridge_ = self.path_.ridges[self.path_.selected]

    def _module(self, X: Array, num_outputs: int) -> nn.Module:
        """The model, or what its builder makes for these data, initialised from the seed."""
        if isinstance(self.model, nn.Module):
            return self.model
        if not callable(self.model):
            raise NNTKError(
                f"model is a {type(self.model).__name__}; allowed: a torch.nn.Module, or a function (n_features, "
                "n_outputs) that returns one"
            )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            built = self.model(int(np.prod(X.shape[1:])), num_outputs)
        if not isinstance(built, nn.Module):
            raise NNTKError(f"model returned a {type(built).__name__}; allowed: a torch.nn.Module")
        return built

    def _scores(self, X: Any) -> Float64[Array, "m T"]:
        check_is_fitted(self)
        inputs = validate_data(self, X, reset=False, dtype=np.float64, allow_nd=True)
        offset = self.kernel_.outputs(inputs) if self.center_outputs else None
        return self.path_.predict(self.kernel_.cross(inputs), self.path_.selected, offset)


class NNTKRegressor(MultiOutputMixin, RegressorMixin, _NonlocalRidge):
    """Kernel ridge regression f(x) = Σ_i K(x, x_i) a_i, (K + ridge·(tr K/n)·I) a = y, K the `plugin` nonlocal kernel.

    `model` is a module, or a function (n_features, n_outputs) that makes one under `seed`; it is not trained and not
    changed. X is (n, features), or (n, …) in whatever shape the model takes, real numbers. Of several ridges the one
    of least exact leave-one-out error is taken (`ridge_`); `center_outputs` fits y − f(x;θ), which asks for as many
    outputs as targets. The other arguments mean what they mean to `nonlocal_kernel`; `weighting="loss"` takes its
    targets from y. Which estimator was used and why: `kernel_.decision`.

    Cost: the features of n examples in `fit` and of m in `predict`, and n³ operations. Under `estimator="activation"`
    a prediction depends on an example's place in X, whose number its noise is made from.

    Raises: NNTKError, a ValueError, as `nonlocal_kernel`; ValueError of scikit-learn for X and y that do not fit.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Compute the kernel of X and solve for every ridge."""
        inputs, targets = validate_data(self, X, y, dtype=np.float64, allow_nd=True, multi_output=True, y_numeric=True)
        self._single_ = targets.ndim == 1
        self._fit(inputs, np.asarray(targets, dtype=np.float64).reshape(len(inputs), -1))
        return self

    def predict(self, X: Any) -> Array:
        """(m,), or (m, T) where y was."""
        scores = self._scores(X)
        return scores[:, 0] if self._single_ else scores


class NNTKClassifier(ClassifierMixin, _NonlocalRidge):
    """Kernel ridge regression on one-hot targets with the nonlocal kernel; the class of the largest score wins.

    Arguments, cost and errors as `NNTKRegressor`, T the number of classes; labels of any type that sorts.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Compute the kernel of X and solve for every ridge."""
        inputs, labels = validate_data(self, X, y, dtype=np.float64, allow_nd=True)
        check_classification_targets(labels)
        self.classes_, indices = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise NNTKError(f"y holds one class, {self.classes_[0]!r}; allowed: examples of two classes or more")
        self._fit(inputs, np.eye(len(self.classes_))[indices], indices)
        return self

    def decision_function(self, X: Any) -> Array:
        """Scores (m, T); of two classes (m,), the second's less the first's."""
        scores = self._scores(X)
        return scores[:, 1] - scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: Any) -> Array:
        """Labels, (m,)."""
        winners = self._scores(X).argmax(axis=1)
        return self.classes_[winners]


def _with_targets(weighting: Weighting, targets: Array) -> Weighting:
    """Targets of the train examples, where the reference batch is taken from these."""
    own = weighting.targets is None and isinstance(weighting.reference, int)
    return replace(weighting, targets=torch.from_numpy(targets)) if own else weighting


def _ridges(ridge: Any) -> tuple[float, ...]:
    """One ridge or several as a tuple of numbers."""
    values = (ridge,) if isinstance(ridge, Real) else ridge
    try:
        return tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise NNTKError(
            f"ridge is {ridge!r}; allowed: a positive number, or several, of which leave-one-out takes one"
        ) from None
