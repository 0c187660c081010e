"""Choose how products of the estimator `activation` are contracted, in the terms of
`nntk_dist.estimators.contraction`.

`layered`  D η ⊗ q in factors: two Gram matrices for S² pairs of draws, for any number of outputs;
`means`    block-mean gradients, formed: 3R·P_l multiply-adds an entry for every output;
`sketch`   block-mean gradients of all sketched layers in the same k numbers.
Parameters in weight space need only D and ⟨n_s, n_t⟩, or formed means if there are more draws than parameters. The
readout needs block means of h̃. Both are always exact. Costs decide; nothing is computed here.

Axes: S draws, R blocks, P_l parameters of a layer.
"""

from dataclasses import dataclass

from nntk_dist.estimators.contraction import Cost, Setting, listed, unaffordable
from nntk_dist.layers.noise import NoiseSite
from nntk_dist.layers.noise_plan import NoisePlan
from nntk_dist.layers.sketch import columns_of_sketch
from nntk_dist.models.parameters import ParameterSpace
from nntk_dist.products.factor_form import METRIC_DRAWS
from nntk_dist.spec import ContractionChoice, KernelSpec, Outputs

# Formed gradients may take up to this many times the memory of the factors that they replace.
_MOST_MEMORY = 4


@dataclass(frozen=True)
class NoiseContraction:
    """The noisy layers whose block means are formed, and those that are sketched; the others stay in factors."""

    formed: frozenset[str] = frozenset()
    sketched: frozenset[str] = frozenset()
    num_columns: int = 0
    forms_weight_space: bool = False

    def text(self, plan: NoisePlan) -> str:
        """Say the choice in words, for plan and report."""
        kinds: dict[str, list[str]] = {"layered": [], "means": [], f"sketch (k = {self.num_columns})": []}
        for each in plan.noisy:
            place = 2 if each.module in self.sketched else 1 if each.module in self.formed else 0
            list(kinds.values())[place].append(each.module or "the model itself")
        words = [f"{kind}: {listed(names)}" for kind, names in kinds.items() if names]
        return "contraction: " + "; ".join(words) if words else ""


def noise_contraction(
    plan: NoisePlan, space: ParameterSpace, spec: KernelSpec, *, num_draws: int, num_outputs: int
) -> NoiseContraction:
    """Choose the requested contraction, or the cheapest exact one, or a sketch if that is too expensive."""
    setting = Setting(num_draws, spec.blocks, num_outputs, full=spec.outputs == Outputs.FULL)
    formed, costs = set[str](), dict[str, Cost]()
    for each in plan.noisy:
        layered, means = _noise_layered_cost(each, setting), _noise_means_cost(each, setting)
        cheaper = means.operations < layered.operations and means.numbers <= _MOST_MEMORY * layered.numbers
        if spec.contraction == ContractionChoice.MEANS or (spec.contraction != ContractionChoice.LAYERED and cheaper):
            formed.add(each.module)
        costs[each.module] = means if each.module in formed else layered
    num_columns, sketched = columns_of_sketch(spec.sketch), frozenset[str]()
    if spec.contraction == ContractionChoice.SKETCH:
        sketched = frozenset(costs)
    elif spec.contraction == ContractionChoice.AUTO and unaffordable(costs.values(), num_columns, setting):
        worth = setting.products * setting.copies * num_columns
        sketched = frozenset(module for module, cost in costs.items() if cost.operations > worth)
    few = setting.products * plan.num_parameters(space)[2] < num_draws
    forms_weight_space = bool(plan.weight_space) and (
        few or num_draws > METRIC_DRAWS or spec.contraction == ContractionChoice.MEANS
    )
    return NoiseContraction(frozenset(formed) - sketched, sketched, num_columns if sketched else 0, forms_weight_space)


def _noise_layered_cost(each: NoiseSite, setting: Setting) -> Cost:
    widths = each.width + each.units
    return Cost(setting.pairs * each.rank**2 * widths, setting.num_draws * each.rank * widths)


def _noise_means_cost(each: NoiseSite, setting: Setting) -> Cost:
    return Cost(
        setting.products * setting.copies * each.num_parameters,
        setting.num_blocks * setting.num_outputs * each.num_parameters,
    )
