"""The plan of the estimator `activation` with control variates: whether a model allows them, and for which layers.

It needs a model without random numbers of its own, and derivatives of the noisy pass, with those of jumps replaced by
smooth ones. Features are `nntk_dist.estimators.layer_noise.activation_gradients`.

Axes: S draws, C outputs.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nntk_dist.estimators.autodiff import contracted_fields
from nntk_dist.estimators.contraction import Contraction, contraction_of
from nntk_dist.estimators.estimator import FeatureSetting, Trial
from nntk_dist.estimators.layer_noise.activation_gradients import ActivationGradients
from nntk_dist.estimators.layer_noise.noisy_passes import NoisyDraws
from nntk_dist.estimators.layer_noise.smoothed_passes import SmoothedDraws
from nntk_dist.layers.flips import Flip, find_flips
from nntk_dist.layers.innovations import Innovation, find_innovations
from nntk_dist.layers.noise_plan import NoisePlan
from nntk_dist.layers.sites import OutputLayers, SitePlan
from nntk_dist.models.evaluation import Evaluator, in_float64
from nntk_dist.models.parameters import ParameterSpace
from nntk_dist.products.wanted import Wanted
from nntk_dist.registration.options import Automatic
from nntk_dist.runtime.memory import is_out_of_memory
from nntk_dist.sampling.draws import Drawing
from nntk_dist.spec import ContractionChoice, KernelSpec, Statistic, VarianceReduction
from nntk_dist.statistics.tile_estimates import calibrate_sample

_EXAMPLES = 4
_TRIAL_DRAWS = 32
_FEWEST_PILOTS, _MOST_PILOTS = 8, 32
_AGREEMENT = 1e-6  # in float64, of weights that are float32 at least


@dataclass(frozen=True)
class ReducedPlan:
    """How the variance is reduced.

    Attributes:
        innovations: what follows the noisy layers.
        sites: the layers as sites of gradients.
        contraction: how products of their gradients are formed.
        num_pilots: the pilot draws of an example.
        flips: the layers whose units are set to their other values.
    """

    innovations: tuple[Innovation, ...]
    sites: SitePlan
    contraction: Contraction
    num_pilots: int
    flips: tuple[Flip, ...] = ()

    @property
    def text(self) -> str:
        """What is done, in words."""
        integrated = [each.module for each in self.innovations if each.integrated]
        flipped = [each.module for each in self.flips]
        others = [each.module for each in self.innovations if not each.integrated and each.module not in flipped]
        parts = [f"noise integrated: {', '.join(integrated)}" if integrated else ""]
        if flipped:
            parts.append(f"units set to either side of their jumps: {', '.join(flipped)}")
        if others:
            parts.append(f"control variates from {self.num_pilots} pilot draws: {', '.join(others)}")
        return "; ".join(filter(None, parts))

    def contracted(self, space: ParameterSpace, spec: KernelSpec, *, num_draws: int, num_outputs: int) -> "ReducedPlan":
        """Contract the same layers for another number of draws."""
        alone = replace(spec, output_projections=0)
        chosen = contraction_of(self.sites, space, alone, num_draws=num_draws, num_outputs=num_outputs)
        # A pilot draw costs C backward passes. As many passes as draws, within bounds; one if J is the same under all.
        pilots = max(_FEWEST_PILOTS, min(_MOST_PILOTS, num_draws // (1 + num_outputs)))
        settled = {each.module for each in self.innovations if each.integrated} | {each.module for each in self.flips}
        if not self.sites.whole and len(settled) == len(self.innovations):
            pilots = 1
        return replace(self, contraction=chosen, num_pilots=pilots)

    def features(self, noise: NoisePlan, setting: FeatureSetting) -> ActivationGradients:
        """Make the features."""
        fields = contracted_fields(self.contraction, setting)
        return ActivationGradients(
            **fields, noise=noise, innovations=self.innovations, num_pilots=self.num_pilots, flips=self.flips
        )


def plan_reduced(noise: NoisePlan, trial: Trial) -> ReducedPlan | None:
    """Return the plan; None if it is not asked for, or the model does not allow it."""
    spec, evaluator, drawing = trial.spec, trial.evaluator, trial.drawing
    assert drawing is not None
    if spec.variance_reduction == VarianceReduction.NONE or spec.groups or spec.group:
        return None
    if evaluator.is_random or not noise.noisy:
        return None
    try:
        found = find_innovations(evaluator.model, noise, trial.x)
        same_inputs, *jacobians = _trial_passes(evaluator, noise, found, drawing, trial.x)
    except Exception as error:  # a model's code may raise anything: it is then computed without
        if is_out_of_memory(error):
            raise
        return None
    innovations = tuple(_integrated_if(each, _agree(*(own[each.module] for own in jacobians))) for each in found)
    outer = tuple(each.site for each in noise.noisy if each.rank == 1)
    readout = () if noise.readout is None else (noise.readout.site,)
    sites = SitePlan(
        outer=outer + readout,
        dense=tuple(each.site for each in noise.noisy if each.rank > 1),
        whole=noise.weight_space,
        output_layers=_output_layers(evaluator, noise, innovations, jacobians[0]),
        readout=None if noise.readout is None else noise.readout.module,
        input_layers=same_inputs & {site.module for site in outer},
    )
    flips = find_flips(evaluator.model, noise, innovations, trial.x, trial.num_kernel_outputs)
    without = ReducedPlan(innovations, sites, Contraction(sites, None, 0), _FEWEST_PILOTS)
    if not flips:
        return without
    either = replace(without, flips=flips), without
    return min(either, key=lambda plan: _price(plan, noise, trial))  # the first if nothing is known of either


def _price(plan: ReducedPlan, noise: NoisePlan, trial: Trial) -> float:
    """Squared relative error of the kernel that is asked for times passes a draw, on a few examples.

    The error of `plugin` is mostly its bias. Infinite if there is only noise.
    """
    space, drawing = trial.evaluator.space, trial.drawing
    assert drawing is not None
    blocks = _TRIAL_DRAWS // drawing.group_size
    drawing = replace(drawing, num_draws=_TRIAL_DRAWS, num_blocks=blocks)
    spec = replace(
        trial.spec,
        draws=_TRIAL_DRAWS,
        blocks=blocks,
        contraction=ContractionChoice.LAYERED,
        sketch=Automatic.AUTO,
        output_projections=Automatic.AUTO,
    )
    outputs = spec.outputs
    columns = (outputs,) if isinstance(outputs, int) else tuple(range(trial.num_outputs))
    plan = plan.contracted(space, spec, num_draws=_TRIAL_DRAWS, num_outputs=len(columns))
    features = plan.features(noise, FeatureSetting(trial.evaluator, spec, drawing, columns))
    x = trial.x[: 2 * _EXAMPLES]
    rows = features.compute(x, torch.arange(len(x), device=x.device), range(_TRIAL_DRAWS), columns)
    passes = features.costs(spec.meeting, Wanted(stderr=True)).passes_per_draw
    assert passes is not None
    try:
        found = calibrate_sample(features, [(rows, rows)], spec.meeting)
    except OverflowError:
        return math.inf
    bias = 0.0 if spec.statistic == Statistic.UNBIASED else found.bias
    price = (found.relative_error**2 + bias**2) * passes
    return math.inf if math.isnan(price) else price


def _trial_passes(
    evaluator: Evaluator, noise: NoisePlan, innovations: tuple[Innovation, ...], drawing: Drawing, x: Tensor
) -> tuple[frozenset[str], dict[str, Tensor], dict[str, Tensor]]:
    """The layers whose inputs no draw changes, and the Jacobians under two draws, in float64."""
    exact, x = in_float64(evaluator.model, x[:_EXAMPLES])
    draws = SmoothedDraws(NoisyDraws(replace(evaluator, model=exact), noise, drawing), innovations)
    sigma, normals = draws.draws.pilot(torch.arange(len(x), device=x.device), 2)
    _, moved = draws.draws.moves_of(range(1), sigma[:1])
    passes = []
    for draw, parameters in enumerate((None, None if moved is None else moved[0])):
        own = {name: values[:, draw : draw + 1] for name, values in normals.items()}
        passes.append(draws.evaluate(x, own, sigma[draw : draw + 1], parameters, differentiable=True))
    first, second = (passed.layers for passed in passes)
    same = frozenset(name for name in first if torch.equal(first[name].vectors, second[name].vectors))
    of_first, of_second = (draws.jacobians(passed, len(x)) for passed in passes)
    return same, of_first, of_second


def _integrated_if(each: Innovation, constant: bool) -> Innovation:
    """The layer without integration if J depends on the draw: then J ⊙ φ̃' is not the mean gradient."""
    return each if constant else replace(each, integrated=False)


def _agree(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, rtol=_AGREEMENT, atol=_AGREEMENT * float(first.abs().max()))


def _output_layers(
    evaluator: Evaluator, noise: NoisePlan, innovations: tuple[Innovation, ...], jacobians: dict[str, Tensor]
) -> OutputLayers | None:
    """The integrated layer before the readout, if f is the readout of its activation: J is the readout's weight."""
    if noise.readout is None:
        return None
    weight = evaluator.model.get_submodule(noise.readout.module).weight
    assert isinstance(weight, Tensor)
    ranks = {each.module: each.rank for each in noise.noisy}
    for each in innovations:
        jacobian = jacobians[each.module]
        if not each.integrated or ranks[each.module] > 1 or jacobian.shape[1:] != (len(weight), 1, weight.shape[1]):
            continue
        expected = weight.detach().to(jacobian).expand(len(jacobian), -1, -1)
        if _agree(jacobian[:, :, 0], expected):
            return OutputLayers(each.module, noise.readout.module)
    return None
