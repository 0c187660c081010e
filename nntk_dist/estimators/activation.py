"""The estimator `activation`: gradients by Stein's identity, with separate pre-activation noise for each example.

A layer computes a = W h̃ + σ|h̃| ξ with h̃ = (h, 1), ξ standard normal and σ = (γ/√2)·U^{1/P}. The nonlocal gradient with
respect to W is E[(f − f(x; θ)) ξ/(σ|h̃|) ⊗ h̃]. This estimator is the project's own; docs/concepts.md derives it.
Related: node perturbation, and the local reparametrization of Kingma, Salimans & Welling (2015).

Valid for Gaussian ρ and any activation, jumps included, if most parameters lie in Linear layers or convolutions that
are called once; unbiased. Its error hardly depends on P. Cost: a forward pass a draw. Its features are
`nntk_dist.estimators.layer_noise.activation_features`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from nntk_dist.errors import NNTKError, Unavailable
from nntk_dist.estimators.contraction import NoiseContraction, noise_contraction
from nntk_dist.estimators.estimator import EstimatorPlan, FeatureSetting, Trial
from nntk_dist.estimators.layer_noise.activation_features import ActivationFeatures, compute_together
from nntk_dist.estimators.layer_noise.activation_gradients import ActivationGradients
from nntk_dist.estimators.layer_noise.noisy_passes import MOST_GROUPS
from nntk_dist.estimators.layer_noise.variance_reduction import ReducedPlan, plan_reduced
from nntk_dist.layers.noise_plan import NoisePlan, plan_noise
from nntk_dist.layers.sketches.sketch import Sketch, groups_of_columns
from nntk_dist.models.evaluation import trying
from nntk_dist.models.parameters import ParameterSpace
from nntk_dist.spec import EstimatorChoice, KernelSpec


@dataclass(frozen=True)
class ActivationPlan(EstimatorPlan):
    """Which layers have noise, and how products of gradients are contracted."""

    noise: NoisePlan
    contraction: NoiseContraction
    moved: NoisePlan | None = None  # of all groups of parameters, if this is the plan of one
    reduced: ReducedPlan | None = None  # how the variance is reduced, if it is

    @property
    def contraction_text(self) -> str:
        """The contraction of each layer, in words, and how the variance is reduced."""
        if self.reduced is None:
            return self.contraction.text(self.noise)
        return "; ".join(filter(None, (self.reduced.contraction.text, self.reduced.text)))

    @property
    def variance_reduced(self) -> bool:
        """Whether noise is integrated, or control variates are taken."""
        return self.reduced is not None

    @property
    def unmoved(self) -> tuple[str, ...]:
        """The readout's parameters: their gradient is exact."""
        readout = self.noise.readout
        return () if readout is None else tuple(name for _, name in readout.site.parameters)


@dataclass(frozen=True)
class Activation:
    """See the module."""

    plan_type = ActivationPlan
    uses_gradients = False
    moves_parameters = False
    forms_gradients = True

    def plan(self, trial: Trial) -> ActivationPlan:
        """Find the layers that can have noise, and check that noise moves the output as their weights do.

        Raises:
            Unavailable: another distribution or design, too many draws, a layer whose noise would not be right, or,
                unless this estimator is requested, noise that reaches less than half of the parameters.
        """
        spec, space, drawing = trial.spec, trial.evaluator.space, trial.drawing
        try:
            replace(spec, estimator="activation")
        except NNTKError as error:
            raise Unavailable(str(error)) from error
        assert drawing is not None
        most = MOST_GROUPS * drawing.group_size
        searched = spec.max_draws if spec.rtol is not None else 0
        for name, number in (("draws", drawing.num_draws), ("max_draws", searched)):
            if number > most:
                raise Unavailable(f"{name} is {number}; allowed for estimator activation: up to {most} ({spec.design})")
        with trying(Unavailable, "its layers cannot be given noise ({reason})"):
            noise = plan_noise(trial.evaluator.model, space, trial.x)
        if spec.estimator == EstimatorChoice.AUTO and 2 * noise.num_parameters(space)[2] > space.num_parameters:
            raise Unavailable("noise in pre-activations would reach less than half of the parameters")
        plan = ActivationPlan(noise, NoiseContraction(), reduced=plan_reduced(noise, trial))
        return self.contracted(plan, space, spec, num_draws=trial.num_draws, num_outputs=trial.num_kernel_outputs)

    def contracted(
        self, plan: ActivationPlan, space: ParameterSpace, spec: KernelSpec, *, num_draws: int, num_outputs: int
    ) -> ActivationPlan:
        """Contract the same layers for another number of draws."""
        sizes = {"num_draws": num_draws, "num_outputs": num_outputs}
        if plan.reduced is not None:
            return replace(plan, reduced=plan.reduced.contracted(space, spec, **sizes))
        return replace(plan, contraction=noise_contraction(plan.noise, space, spec, **sizes))

    def of_group(
        self,
        plan: ActivationPlan,
        names: frozenset[str],
        space: ParameterSpace,
        spec: KernelSpec,
        *,
        num_draws: int,
        num_outputs: int,
    ) -> ActivationPlan:
        """Keep the gradients of these parameters; the noise stays that of all groups."""
        own = ActivationPlan(plan.noise.only(names), plan.contraction, plan.noise)
        return self.contracted(own, space, spec, num_draws=num_draws, num_outputs=num_outputs)

    def compute_groups(
        self,
        groups: Mapping[str, ActivationFeatures],
        x: Tensor,
        ids: Tensor,
        draws: range,
        columns: Sequence[int],
        *,
        batch: int | None = None,
    ) -> dict[str, dict[str, Tensor]]:
        """Compute the features of all groups in the same noisy passes."""
        found = compute_together([*groups.values()], x, ids, draws, columns, batch=batch)
        return dict(zip(groups, found, strict=True))

    def statement(self, plan: ActivationPlan, space: ParameterSpace) -> str:
        """Say how many parameters go each of the three ways."""
        noisy, readout, weight_space = plan.noise.num_parameters(space)
        return (
            f"of {space.num_parameters} parameters {noisy} are reached by noise in the pre-activations of "
            f"{len(plan.noise.noisy)} layers, {readout} lie in the readout, whose gradient is exact, and "
            f"{weight_space} are perturbed themselves"
        )

    def features(self, plan: ActivationPlan, setting: FeatureSetting) -> ActivationFeatures | ActivationGradients:
        """Make noisy passes and their products."""
        if plan.reduced is not None:
            return plan.reduced.features(plan.noise, setting)
        spec, chosen, space = setting.spec, plan.contraction, setting.evaluator.space
        assert setting.drawing is not None
        sketch = None
        if chosen.sketched:
            groups = groups_of_columns(chosen.num_columns, spec.blocks)
            sketch = Sketch(spec.seed, chosen.num_columns, groups, space.names)
        return ActivationFeatures(
            setting.evaluator, setting.drawing, setting.columns, plan.noise, chosen, sketch, plan.moved
        )


ACTIVATION = Activation()
