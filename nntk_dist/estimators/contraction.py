"""Choose how products of gradients are contracted, layer by layer: in factors, from means, or from a sketch.

`layered`  a Linear on one vector per example: ⟨h̃,h̃'⟩⟨δ,δ'⟩ for S² pairs of draws (S pairs if a draw meets only
           itself). If no draw changes h̃: ⟨h̃,h̃'⟩ once, and R + 1 products of mean δ.
`means`    block-mean gradients, formed: (R + 1)·P_l multiply-adds an entry, R·P_l numbers a row and output. For the
           readout, whose δ is the identity, block means of h̃ alone: (R + 1)·i for all outputs together.
`sketch`   block-mean gradients in k numbers (`nntk_dist.layers.sketches.sketch`): all sketched layers, and all outputs
           that are summed, share the same k numbers: (R + 1)·k.

Multiplying and adding up the two products of a pair of draws has a separate cost. The first two ways are exact.
`auto` takes the cheaper of them, and a sketch only if exactness is too expensive; for kind `local`, whose exact kernel
has no error, only if a sketch is asked for. Nothing is computed here.

The same three ways exist for the noisy layers of `activation`:

`layered`  D η ⊗ q in factors: two Gram matrices for S² pairs of draws, for any number of outputs.
`means`    block-mean gradients, formed: (R + 1)·P_l multiply-adds an entry for every output.
`sketch`   block-mean gradients of all sketched layers in the same k numbers.

Its parameters in weight space need only D and ⟨n_s, n_t⟩, or formed means if there are more draws than parameters. Its
readout needs block means of h̃. Both are always exact.

Axes: S draws, R blocks, P_l parameters of a layer, i/o widths of h̃/δ, k numbers of the sketch.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from nntk_dist.layers.noise import NoiseSite
from nntk_dist.layers.noise_plan import NoisePlan
from nntk_dist.layers.sites import Site, SitePlan
from nntk_dist.layers.sketches.projected_outputs import count_directions
from nntk_dist.layers.sketches.sketch import columns_of_sketch
from nntk_dist.models.parameters import ParameterSpace
from nntk_dist.products.factor_form import METRIC_DRAWS
from nntk_dist.spec import ContractionChoice, KernelSpec, Kind, Outputs

# `auto` sketches only if exact features of a row exceed this many bytes (in float32, one output at a time: a thousand
# rows would take 8 GiB), and exact products take this many times the operations of a sketch of k numbers per output. (A
# joint sketch takes fewer, which makes exactness no more expensive.)
AFFORDABLE_BYTES = 8 << 20
AFFORDABLE_OPERATIONS = 32
# Multiplying and adding up an entry of a pair's products, in multiply-adds of a matrix product. Measured on one core:
# 107 to 168 on an AMD EPYC with fresh memory, 230 to 450 on an Intel Xeon with reused memory, whose matrix products are
# faster; widths of 32 and 128, sums by block included.
PAIR_OPERATIONS = 128
# Formed gradients of noisy layers may take up to this many times the memory of the factors that they replace.
_MOST_MEMORY = 4
_NAMES_SHOWN = 4

Layer = TypeVar("Layer", bound=Hashable)


@dataclass(frozen=True)
class Setting:
    """The sizes of a kernel on which costs depend, beside the layers; directions are those of a sketch."""

    num_draws: int
    num_blocks: int
    num_outputs: int
    pair_blocks: bool = True
    full: bool = False
    num_directions: int = 0

    @property
    def pairs(self) -> int:
        """Pairs of draws that an entry of layered features multiplies."""
        return self.num_draws**2 if self.pair_blocks else self.num_draws

    @property
    def products(self) -> int:
        """Products that an entry of formed features takes, standard errors included."""
        return self.num_blocks + 1 if self.pair_blocks else self.num_draws

    @property
    def slots(self) -> int:
        """Means of a row that formed features keep."""
        return self.num_blocks if self.pair_blocks else self.num_draws

    @property
    def copies(self) -> int:
        """Entries that a pair of examples has: C, or C² if outputs are kept apart."""
        return self.num_outputs**2 if self.full else self.num_outputs

    @property
    def outputs_at_once(self) -> int:
        """Outputs whose features are held at the same time."""
        return self.num_outputs if self.full else 1

    def means_operations(self, num_numbers: int) -> int:
        """Return the multiply-adds of an entry for formed means of this many numbers an output."""
        return self.products * self.copies * num_numbers


@dataclass(frozen=True)
class Cost:
    """The cost of a layer: multiply-adds of an entry, numbers of a row."""

    operations: int
    numbers: int


@dataclass(frozen=True)
class Contraction:
    """The plan of the exact parameters and the plan of the sketched ones; `sketched` is None without a sketch.

    The sketch has `num_columns` numbers. Its outputs are projected on `num_directions`, if that is not 0.
    """

    exact: SitePlan
    sketched: SitePlan | None
    num_columns: int
    num_directions: int = 0

    @property
    def text(self) -> str:
        """The choice in words, for plan and report."""
        readout = self.exact.readout
        layers = [site.module for site in self.exact.outer if site.module != readout]
        means = [site.module for site in self.exact.outer if site.module == readout]
        sketched = () if self.sketched is None else self.sketched.dense_names()
        return _text(layers, [*means, *self.exact.dense_names()], sketched, self.num_columns, self.num_directions)


@dataclass(frozen=True)
class NoiseContraction:
    """The noisy layers whose block means are formed, and those that are sketched; the others stay in factors."""

    formed: frozenset[str] = frozenset()
    sketched: frozenset[str] = frozenset()
    num_columns: int = 0
    forms_weight_space: bool = False

    def text(self, plan: NoisePlan) -> str:
        """Say the choice in words, for plan and report."""
        modules = [each.module for each in plan.noisy]
        layered = [module for module in modules if module not in self.formed | self.sketched]
        formed, sketched = ([module for module in modules if module in own] for own in (self.formed, self.sketched))
        return _text(layered, formed, sketched, self.num_columns)


def contraction_of(
    plan: SitePlan, space: ParameterSpace, spec: KernelSpec, *, num_draws: int, num_outputs: int
) -> Contraction:
    """Choose the contraction of a kernel of gradients with `num_outputs` model outputs."""
    blocks = 1 if spec.kind == Kind.LOCAL else spec.blocks
    num_columns, full = columns_of_sketch(spec.sketch) if spec.may_sketch else 0, spec.outputs == Outputs.FULL
    directions = 0
    if num_columns and not full:
        directions = count_directions(spec.output_projections, num_columns, blocks, num_outputs)
    setting = Setting(num_draws, blocks, num_outputs, spec.pair_blocks, full, directions)
    asked = ContractionChoice.SKETCH if spec.kind == Kind.LOCAL and num_columns else spec.contraction
    return choose_contraction(plan, space, asked, num_columns, setting)


def choose_contraction(
    plan: SitePlan, space: ParameterSpace, contraction: str, num_columns: int, setting: Setting
) -> Contraction:
    """Choose the contraction of every layer.

    The exact plan keeps its `readout` only if that layer's inputs stand for its gradients.

    Args:
        plan: how each parameter's gradient is made.
        space: the selected parameters.
        contraction: the requested one: `auto`, `layered`, `means` or `sketch`.
        num_columns: k, or 0 if no sketch is allowed.
        setting: the kernel's sizes.
    """
    plan = replace(plan, input_layers=_repeated_inputs(plan, space, setting))
    cheapest, costs = _exact(plan, space, contraction, setting)
    chosen = _sketched(costs, contraction, num_columns, setting)
    if chosen and setting.num_directions:  # whatever is left would take a backward pass for every output
        chosen |= costs.keys() - {
            tuple(n for _, n in site.parameters) for site in plan.outer if site.module == plan.readout
        }
    names = frozenset(name for group in chosen for name in group)
    if not names:
        return Contraction(cheapest, None, 0)
    formed = plan.densified(frozenset(site.module for site in plan.outer))
    return Contraction(cheapest.only(plan.names() - names), formed.only(names), num_columns, setting.num_directions)


def _exact(
    plan: SitePlan, space: ParameterSpace, contraction: str, setting: Setting
) -> tuple[SitePlan, dict[tuple[str, ...], Cost]]:
    """The requested exact plan, or the cheapest one, and its cost for each group of parameters."""
    sizes = dict(zip(space.names, space.sizes, strict=True))
    formed, costs = set[str](), dict[tuple[str, ...], Cost]()
    for site in plan.outer:
        names = tuple(name for _, name in site.parameters)
        means = _means_cost(sum(sizes[name] for name in names), setting)
        layered = _layered_cost(space, plan, site, setting)
        if contraction == ContractionChoice.MEANS or (
            contraction != ContractionChoice.LAYERED and means.operations < layered.operations
        ):
            formed.add(site.module)
        costs[names] = means if site.module in formed else layered
    for name in plan.dense_names():
        costs[(name,)] = _means_cost(sizes[name], setting)
    return plan.densified(frozenset(formed)), costs


def _means_cost(num_parameters: int, setting: Setting) -> Cost:
    return Cost(setting.means_operations(num_parameters), setting.slots * setting.outputs_at_once * num_parameters)


def _layered_cost(space: ParameterSpace, plan: SitePlan, site: Site, setting: Setting) -> Cost:
    inputs, units = linear_widths(space, site)
    if plan.readout == site.module:
        return Cost(setting.products * inputs, setting.slots * inputs)
    if setting.pair_blocks and site.module in plan.input_layers:
        operations = inputs + setting.means_operations(units)
        return Cost(operations, setting.num_draws * (inputs + setting.outputs_at_once * units))
    shared = shares_derivatives(plan, site, full=setting.full)
    return Cost(
        setting.pairs * (inputs + (1 if shared else setting.copies) * units + PAIR_OPERATIONS),
        setting.num_draws * (inputs + setting.outputs_at_once * units),
    )


def _repeated_inputs(plan: SitePlan, space: ParameterSpace, setting: Setting) -> frozenset[str]:
    """The layers whose pairs of draws become pairs of mean δ, because their h̃ is the same under all draws.

    Not the readout; nor the layer before it if its derivatives, which all outputs share, cost less.
    """
    chosen = set[str]()
    for site in plan.outer if setting.pair_blocks else ():
        if site.module in plan.input_layers and site.module != plan.readout:
            as_others = _layered_cost(space, replace(plan, input_layers=frozenset()), site, setting)
            if _layered_cost(space, plan, site, setting).operations <= as_others.operations:
                chosen.add(site.module)
    return frozenset(chosen)


def shares_derivatives(plan: SitePlan, site: Site, *, full: bool) -> bool:
    """Return whether all outputs share a layer's derivatives (`nntk_dist.layers.penultimate`) and are summed over."""
    return plan.output_layers is not None and plan.output_layers.module == site.module and not full


def noise_contraction(
    plan: NoisePlan, space: ParameterSpace, spec: KernelSpec, *, num_draws: int, num_outputs: int
) -> NoiseContraction:
    """Choose the requested contraction, or the cheapest exact one, or a sketch if that is too expensive."""
    setting = Setting(num_draws, spec.blocks, num_outputs, full=spec.outputs == Outputs.FULL)
    formed, costs = set[str](), dict[str, Cost]()
    for each in plan.noisy:
        layered, means = _noise_costs(each, setting)
        cheaper = means.operations < layered.operations and means.numbers <= _MOST_MEMORY * layered.numbers
        if spec.contraction == ContractionChoice.MEANS or (spec.contraction != ContractionChoice.LAYERED and cheaper):
            formed.add(each.module)
        costs[each.module] = means if each.module in formed else layered
    num_columns = columns_of_sketch(spec.sketch)
    sketched = _sketched(costs, spec.contraction, num_columns, setting)
    few = setting.products * plan.num_parameters(space)[2] < num_draws
    forms_weight_space = bool(plan.weight_space) and (
        few or num_draws > METRIC_DRAWS or spec.contraction == ContractionChoice.MEANS
    )
    return NoiseContraction(frozenset(formed) - sketched, sketched, num_columns if sketched else 0, forms_weight_space)


def _noise_costs(each: NoiseSite, setting: Setting) -> tuple[Cost, Cost]:
    """The costs of a noisy layer in factors, and from formed means of all outputs."""
    widths, numbers = each.width + each.units, setting.num_blocks * setting.num_outputs * each.num_parameters
    layered = Cost(setting.pairs * each.rank**2 * widths, setting.num_draws * each.rank * widths)
    return layered, Cost(setting.means_operations(each.num_parameters), numbers)


def _sketched(costs: Mapping[Layer, Cost], contraction: str, num_columns: int, setting: Setting) -> frozenset[Layer]:
    """The layers to sketch: all if asked for; with `auto` the dearest, if exactness takes too much memory and time."""
    if contraction == ContractionChoice.SKETCH:
        return frozenset(costs)
    worth = setting.means_operations(num_columns)
    too_long = sum(cost.operations for cost in costs.values()) > AFFORDABLE_OPERATIONS * worth
    too_large = 4 * sum(cost.numbers for cost in costs.values()) > AFFORDABLE_BYTES
    if contraction == ContractionChoice.AUTO and num_columns and too_long and too_large:
        return frozenset(layer for layer, cost in costs.items() if cost.operations > worth)
    return frozenset()


def linear_widths(space: ParameterSpace, site: Site) -> tuple[int, int]:
    """Return the lengths of h̃ and of δ of a Linear site."""
    shapes, names = dict(zip(space.names, space.shapes, strict=True)), dict(site.parameters)
    inputs = shapes[names["weight"]][1] if "weight" in names else 0
    return inputs + ("bias" in names), shapes[site.parameters[0][1]][0]


def _text(
    layered: Sequence[str], means: Sequence[str], sketched: Sequence[str], num_columns: int, num_directions: int = 0
) -> str:
    projected = f", outputs projected on {num_directions} directions" if num_directions else ""
    kinds = {"layered": layered, "means": means, f"sketch (k = {num_columns}{projected})": sketched}
    words = [f"{kind}: {_listed(names)}" for kind, names in kinds.items() if names]
    return "contraction: " + "; ".join(words) if words else ""


def _listed(names: Sequence[str]) -> str:
    """List the first few names, and count the rest."""
    shown = ", ".join(name or "the model itself" for name in names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
