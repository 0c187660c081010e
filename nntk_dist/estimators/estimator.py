"""What an estimator answers: whether it is available for a model, how it contracts, and the features that it computes.

An estimator is a stateless object, registered by one line in `nntk_dist.registration.estimators` or by an entry point
of the group `nntk_dist.estimators`. Its plan is a frozen value of numbers, words and other frozen values, so that a
manifest can hold it. Which estimator computes a kernel is decided in `nntk_dist.planning.decision`.

Axes: n examples, c outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from nntk_dist.models.evaluation import Evaluator
from nntk_dist.models.parameters import ParameterSpace
from nntk_dist.products.features import FeatureMap
from nntk_dist.sampling.draws import Drawing
from nntk_dist.spec import KernelSpec
from nntk_dist.weighting.attention import Attention


@dataclass(frozen=True)
class Trial:
    """A prepared model with a few examples, on which an estimator is tried.

    Attributes:
        evaluator: the model, its selected parameters, and whether perturbed models are stacked.
        spec: the kernel.
        x: a few examples.
        drawing: the draws of the kernel; None for the kind `local`, which has none.
        num_outputs: C, the number of the model's outputs.
    """

    evaluator: Evaluator
    spec: KernelSpec
    x: Tensor
    drawing: Drawing | None
    num_outputs: int

    @property
    def num_draws(self) -> int:
        """S, the number of perturbed models; 1 for the gradient at θ."""
        return 1 if self.drawing is None else self.drawing.num_draws

    @property
    def num_kernel_outputs(self) -> int:
        """The number of outputs that the kernel is made of."""
        return 1 if isinstance(self.spec.outputs, int) else self.num_outputs


@dataclass(frozen=True)
class FeatureSetting:
    """The inputs of a feature map besides the estimator's plan.

    Attributes:
        evaluator: the model, its selected parameters, and whether perturbed models are stacked.
        spec: the kernel, with the number of draws that was decided.
        drawing: the draws; None for the kind `local`.
        columns: the indices of the model outputs in the kernel.
        metric: M of output differences, if it has been computed before.
        attention: the weights of the draws; None if all are equal.
    """

    evaluator: Evaluator
    spec: KernelSpec
    drawing: Drawing | None
    columns: tuple[int, ...]
    metric: Tensor | None = None
    attention: Attention | None = None


@dataclass(frozen=True)
class EstimatorPlan:
    """Base of the plans of estimators: what the decision reports of them."""

    @property
    def contraction_text(self) -> str:
        """How products are contracted, in words; empty if there is nothing to say."""
        return ""

    @property
    def unmoved(self) -> tuple[str, ...]:
        """Selected parameters that no draw moves."""
        return ()

    @property
    def variance_reduced(self) -> bool:
        """Whether draws have control variates, or noise is integrated."""
        return False


class Estimator(Protocol):
    """A way to estimate g(x), or the gradients of another kind of kernel."""

    @property
    def plan_type(self) -> type[EstimatorPlan]:
        """The class of its plans, with which a stored plan is restored."""

    @property
    def uses_gradients(self) -> bool:
        """Whether it differentiates the model: it is then unavailable for models that jump in their parameters."""

    @property
    def moves_parameters(self) -> bool:
        """Whether it evaluates the model at many perturbed parameters, which can be stacked in one call."""

    @property
    def forms_gradients(self) -> bool:
        """Whether it makes gradients layer by layer, so that `contraction` has a meaning."""

    def plan(self, trial: Trial) -> EstimatorPlan:
        """Try the estimator on a model and plan it, with the contraction for the kernel's own number of draws.

        Raises:
            Unavailable: it is not valid for this model or kernel; `auto` then tries another one.
        """

    def contracted(
        self, plan: Any, space: ParameterSpace, spec: KernelSpec, *, num_draws: int, num_outputs: int
    ) -> EstimatorPlan:
        """Return the plan with the contraction for a number of draws and of kernel outputs: from values alone."""

    def statement(self, plan: Any, space: ParameterSpace) -> str:
        """Say why it is valid and what it does to the parameters."""

    def features(self, plan: Any, setting: FeatureSetting) -> FeatureMap:
        """Make the object that computes features; nothing is tried or decided here."""


@runtime_checkable
class GroupEstimator(Estimator, Protocol):
    """An estimator of a kernel that is a sum over parameters, so that groups of them have kernels of their own."""

    def of_group(
        self,
        plan: Any,
        names: frozenset[str],
        space: ParameterSpace,
        spec: KernelSpec,
        *,
        num_draws: int,
        num_outputs: int,
    ) -> EstimatorPlan:
        """Return the plan of some tensors' part of the kernel: from values alone. All parameters move as before."""

    def compute_groups(
        self,
        groups: Mapping[str, Any],
        x: Tensor,
        ids: Tensor,
        draws: range,
        columns: Sequence[int],
        *,
        batch: int | None = None,
    ) -> dict[str, dict[str, Tensor]]:
        """Compute what `FeatureMap.compute` of each group returns, in the same passes over the model."""
