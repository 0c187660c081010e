"""Kernel ridge regression with the nonlocal kernel of a model, by scikit-learn's conventions.

`fit` computes the train kernel once and keeps the train features, so that `predict` uses the same kernel (the same
draws) between new examples and the train examples. Everything is held in memory; use the pipeline for larger data.

Axes: n train examples, m new examples, T target columns (one for each class), C outputs of the model.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float64
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from nntk_dist.analysis.regression.dense import fit_ridge_path
from nntk_dist.errors import ArgumentError, DataError, check_choice
from nntk_dist.kernels.prepared import BATCH, Placement, PreparedKernel, prepare
from nntk_dist.planning.decision import Decision
from nntk_dist.products.features import Rows
from nntk_dist.runtime.precision import full_precision
from nntk_dist.sampling.laws import has_gamma
from nntk_dist.spec import KernelSpec, Statistic, kernel_options, kernel_signature, make_spec
from nntk_dist.spec.options import plain_default
from nntk_dist.statistics.tile_estimates import tile_estimates
from nntk_dist.weighting.options import Weighting, as_weighting

Array = np.ndarray
ModelOrBuilder = nn.Module | Callable[[int, int], nn.Module]
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class TrainedKernel:
    """The kernel `plugin` of a model with the features of its train examples.

    Attributes:
        prepared: the kernel, with the decision about the model.
        rows: the features of the train examples.
        num_train: n.
    """

    prepared: PreparedKernel
    rows: Rows
    num_train: int

    @property
    def spec(self) -> KernelSpec:
        """The kernel's description."""
        return self.prepared.spec

    @property
    def decision(self) -> Decision:
        """Which estimator, why, and how it is computed."""
        return self.prepared.decision

    @full_precision()
    def gram(self) -> Float64[Array, "n n"]:
        """Return train by train, (n·C)² for `full`; bitwise symmetric."""
        return self._meet(self.rows).cpu().numpy()

    @full_precision()
    def cross(self, inputs: Array) -> Float64[Array, "m n"]:
        """Return new examples by train."""
        x = self._taken(inputs)
        ids = torch.arange(self.num_train, self.num_train + len(x), device=x.device)
        return self._meet(self.prepared.rows(x, ids, self._batch)).cpu().numpy()

    @full_precision()
    def own(self, inputs: Array) -> Float64[Array, "m"]:
        """Return the kernel of each new example with itself, (m·C,) for `full`."""
        x = self._taken(inputs)
        ids = torch.arange(self.num_train, self.num_train + len(x), device=x.device)
        rows, spec = self.prepared.rows(x, ids, self._batch), self.prepared.spec
        meeting = replace(spec.meeting, paired=True)
        values = tile_estimates(self.prepared.features, [(rows, rows)], meeting, None, spec.scale)["plugin"]
        return (values.diagonal(dim1=1, dim2=2) if values.ndim == 3 else values).reshape(-1).cpu().numpy()

    @full_precision()
    def outputs(self, inputs: Array) -> Float64[Array, "m C"]:
        """Return f(x; θ)."""
        outputs = self.prepared.features.outputs(self._taken(inputs), batch=self._batch)
        return outputs.double().cpu().numpy()

    @property
    def _batch(self) -> int:
        return min(self.prepared.placement.batch, self.num_train)

    def _taken(self, inputs: Array) -> Tensor:
        if inputs.shape[1:] != self.prepared.example_shape:
            raise DataError(
                f"X has examples of shape {inputs.shape[1:]}; allowed: {self.prepared.example_shape}, as fitted"
            )
        placement = self.prepared.placement
        return torch.from_numpy(inputs).to(placement.device, placement.dtype, copy=True)  # models may write to inputs

    def _meet(self, rows: Rows) -> Tensor:
        spec = self.prepared.spec
        return tile_estimates(self.prepared.features, [(rows, self.rows)], spec.meeting, None, spec.scale)["plugin"]


@full_precision()
def train_kernel(model: nn.Module, inputs: Array, spec: KernelSpec, placement: Placement) -> TrainedKernel:
    """Decide on the train examples how the kernel is computed, and compute their features."""
    x = placement.take(inputs, "X")
    prepared = prepare(model, [x], spec, placement)
    ids = torch.arange(len(x), device=placement.device)
    return TrainedKernel(prepared, prepared.rows(x, ids, placement.batch_for(x)), len(x))


class _NonlocalRidge(BaseEstimator):
    """What regressor and classifier share; their docstrings say what it means."""

    model: ModelOrBuilder
    kind: str
    seed: int
    ridge: float | Sequence[float]
    center_outputs: bool
    device: torch.device | str | None
    dtype: torch.dtype | None
    batch: int

    def __init__(
        self,
        model: ModelOrBuilder,
        *,
        ridge: float | Sequence[float] = _RIDGES,
        center_outputs: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        batch: int = BATCH,
        **options: Any,
    ) -> None:
        own = {"ridge": ridge, "center_outputs": center_outputs, "device": device, "dtype": dtype, "batch": batch}
        names = list(_OPTIONS)
        for name in options:
            check_choice("an argument", name, (*names, *own))
        defaults = {name: plain_default(each) for name, each in _OPTIONS.items()}
        for name, value in ({"model": model} | own | defaults | options).items():
            setattr(self, name, value)  # as given: scikit-learn compares them by identity

    def _fit(self, X: Array, targets: Float64[Array, "n T"], labels: Array | None = None) -> None:
        """Kernel and solutions; a weighting by the loss compares with the labels, or with the targets themselves."""
        model = self._module(X, targets.shape[1])
        placement = Placement.of(model, X, device=self.device, dtype=self.dtype, batch=self.batch)
        ridges = _ridges(self.ridge)
        self.kernel_ = train_kernel(model, X, self._spec(targets if labels is None else labels), placement)
        offset = self.kernel_.outputs(X) if self.center_outputs else None
        self.path_ = fit_ridge_path(self.kernel_.gram(), targets, ridges, offset=offset)
        self.ridge_ = self.path_.ridges[self.path_.selected]

    def _spec(self, targets: Array) -> KernelSpec:
        """The kernel; options that its kind lacks may only have their defaults."""
        applies = kernel_options(self.kind)
        values = {name: getattr(self, name) for name in _OPTIONS}
        given = {
            name: value
            for name, value in values.items()
            if name in applies or name == "kind" or value != plain_default(_OPTIONS[name])
        }
        if "weighting" in given:
            given["weighting"] = _with_targets(as_weighting(given["weighting"]), targets)
        if given.get("gamma", 0.0) is None and not has_gamma(given["distribution"]):
            given["gamma"] = KernelSpec().distribution.gamma
        if "statistic" in applies:
            given["statistic"] = Statistic.PLUGIN
        spec = make_spec(None, given, called=type(self).__name__)
        if spec.groups:
            raise ArgumentError(
                f"parameters is a mapping of groups, each with a kernel; allowed for {type(self).__name__}: a list of "
                "name patterns"
            )
        return spec

    def _module(self, X: Array, num_outputs: int) -> nn.Module:
        """The model, or what its builder makes for these data, initialised from the seed."""
        if isinstance(self.model, nn.Module):
            return self.model
        if not callable(self.model):
            raise ArgumentError(
                f"model is a {type(self.model).__name__}; allowed: a torch.nn.Module, or a function (n_features, "
                "n_outputs) that returns one"
            )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            built = self.model(int(np.prod(X.shape[1:])), num_outputs)
        if not isinstance(built, nn.Module):
            raise ArgumentError(f"model returned a {type(built).__name__}; allowed: a torch.nn.Module")
        return built

    def _scores(self, X: Any) -> Float64[Array, "m T"]:
        check_is_fitted(self)
        inputs = validate_data(self, X, reset=False, dtype=np.float64, allow_nd=True)
        offset = self.kernel_.outputs(inputs) if self.center_outputs else None
        return self.path_.predict(self.kernel_.cross(inputs), self.path_.selected, offset)


# The options of every kind of kernel; the statistic of a regression is always `plugin`.
_OPTIONS = {
    name: each
    for name, each in kernel_options().items()
    if name != "statistic" and "only_in_configuration" not in each.facts
}


def _show_options() -> None:
    """Give the constructor the signature from which scikit-learn reads the parameters."""
    whole = kernel_signature(None, _NonlocalRidge.__init__)
    kept = [each for name, each in whole.parameters.items() if name != "statistic"]
    _NonlocalRidge.__init__.__signature__ = whole.replace(parameters=kept)  # type: ignore[attr-defined]


_show_options()


class NNTKRegressor(MultiOutputMixin, RegressorMixin, _NonlocalRidge):
    """Kernel ridge regression f(x) = Σ_i K(x, x_i) a_i, (K + ridge·(tr K/n)·I) a = y, K the `plugin` nonlocal kernel.

    `model` is a module, or a function (n_features, n_outputs) that makes one under `seed`; it is neither trained nor
    changed. X is (n, features), or (n, …) in the shape that the model takes, real numbers. Of several ridges, the one
    with the least exact leave-one-out error is used (`ridge_`). `center_outputs` fits y − f(x;θ), which needs as many
    outputs as targets. `prepare_kernel` explains the other arguments; `weighting="loss"` takes its targets from y.
    Which estimator was used and why: `kernel_.decision`.

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

    def predict(self, X: Any, return_std: bool = False) -> Array | tuple[Array, Array]:
        """Return predictions, (m,), or (m, T) if y was (n, T), and with `return_std` also their standard deviations.

        These are of the Gaussian process with covariance s²K and noise variance s²μ, μ the ridge in the kernel's unit:
        s²(k(x,x) − k_xᵀ(K + μI)⁻¹k_x), with the most likely amplitude s² = yᵀ(K + μI)⁻¹y/n of each column. They leave
        out the noise of an observation and the error of the kernel itself. Cost: the train kernel again, and n³/3
        operations.
        """
        scores = self._scores(X)
        predictions = scores[:, 0] if self._single_ else scores
        if not return_std:
            return predictions
        deviations = np.sqrt(self._variances(X))
        return predictions, deviations[:, 0] if self._single_ else deviations

    def _variances(self, X: Any) -> Float64[Array, "m T"]:
        inputs = validate_data(self, X, reset=False, dtype=np.float64, allow_nd=True)
        gram, cross = self.kernel_.gram(), self.kernel_.cross(inputs)
        ridge = self.path_.absolute_ridges[self.path_.selected]
        factor = cho_factor(gram + ridge * np.eye(len(gram)), lower=True, overwrite_a=True)
        explained = np.einsum("ij,ji->i", cross, cho_solve(factor, cross.T))
        coefficients = self.path_.coefficients[self.path_.selected]
        # y = (K + μI)a, and K a = y − μa: so y·a needs no other product
        wanted = self.path_.residuals[self.path_.selected].reshape(coefficients.shape) + gram @ coefficients
        amplitudes = (wanted * coefficients).mean(axis=0)
        left = np.maximum(self.kernel_.own(inputs) - explained, 0.0)
        return left.reshape(len(inputs), -1) * amplitudes


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
            raise ArgumentError(f"y holds one class, {self.classes_[0]!r}; allowed: examples of two classes or more")
        targets = np.eye(len(self.classes_))[indices]
        self._fit(inputs, targets, indices)
        left_out = targets - self.path_.loo_residuals[self.path_.selected]
        self.sharpness_ = _sharpness(left_out, indices)
        return self

    def decision_function(self, X: Any) -> Array:
        """Return scores (m, T); for two classes (m,), the second's less the first's."""
        scores = self._scores(X)
        return scores[:, 1] - scores[:, 0] if len(self.classes_) == 2 else scores

    def predict_proba(self, X: Any) -> Float64[Array, "m T"]:
        """Return class probabilities, softmax(a·scores): `sharpness_` a maximises the leave-one-out likelihood."""
        scores = self._scores(X)
        return softmax(self.sharpness_ * scores, axis=1)

    def predict(self, X: Any) -> Array:
        """Return labels, (m,)."""
        winners = self._scores(X).argmax(axis=1)
        return self.classes_[winners]


def _with_targets(weighting: Weighting, targets: Array) -> Weighting:
    """Add the targets of the train examples, if the reference batch is taken from them."""
    own = weighting.targets is None and isinstance(weighting.reference, int)
    return replace(weighting, targets=torch.from_numpy(targets)) if own else weighting


def _sharpness(scores: Float64[Array, "n T"], labels: Array) -> float:
    """The factor a with the largest likelihood of the labels under softmax(a·scores), from 1e-3 to 1e3."""
    rows = np.arange(len(labels))

    def loss(exponent: float) -> float:
        return -float(log_softmax(math.exp(exponent) * scores, axis=1)[rows, labels].mean())

    bounds = (math.log(1e-3), math.log(1e3))
    return math.exp(float(minimize_scalar(loss, bounds=bounds, method="bounded").x))


def _ridges(ridge: Any) -> tuple[float, ...]:
    """One ridge or several as a tuple of numbers."""
    values = (ridge,) if isinstance(ridge, Real) else ridge
    try:
        return tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise ArgumentError(
            f"ridge is {ridge!r}; allowed: a positive number, or several, from which leave-one-out takes the best"
        ) from None
