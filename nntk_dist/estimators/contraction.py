"""How products of gradient features are contracted, layer by layer: in layers, from means, or from a sketch.

`layered`  a Linear on one vector an example: ⟨h̃,h̃'⟩⟨δ,δ'⟩ for S² pairs of draws (S where each meets only itself);
           where h̃ is the same under every draw, ⟨h̃,h̃'⟩ once, and R + 1 products of mean δ;
`means`    block-mean gradients, formed: (R + 1)·P_l multiply-adds an entry, R·P_l numbers a row and output; of the
           readout, whose δ is the identity, block means of h̃ alone where outputs are summed over: (R + 1)·i;
`sketch`   block-mean gradients in k numbers (`nntk_dist.layers.sketch`), all sketched layers, and all outputs that are
           summed over, in the same k: (R + 1)·k.
A pair of draws also costs what its two products are multiplied and added up for. The first two are exact. `auto` takes
the cheaper of them, and sketches only where exactness cannot be afforded. It decides and says so; nothing is computed
here.

Axes: S draws, R blocks, P_l parameters of a layer, i/o widths of h̃/δ, k numbers of the sketch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from nntk_dist.layers.sites import Site, SitePlan
from nntk_dist.layers.sketch import columns_of_sketch
from nntk_dist.models.parameters import ParameterSpace
from nntk_dist.spec import KernelSpec

# `auto` sketches only where exact features of a row exceed this (in float32, one output at a time: a thousand rows
# would take 8 GiB) and exact products take so many times the operations of a sketch of k numbers an output: a joint one
# takes fewer, which makes exactness no dearer than it was.
AFFORDABLE_BYTES = 8 << 20
AFFORDABLE_OPERATIONS = 32
# What multiplying and adding up an entry of a pair's products takes, in multiply-adds of a matrix product. Of one core
# 107 to 168 were measured on an AMD EPYC, before such products were kept in memory that is used again, and since then
# 230 to 450 on an Intel Xeon, whose products are faster; widths of 32 and 128, sums by block included.
PAIR_OPERATIONS = 128
_NAMES_SHOWN = 4


@dataclass(frozen=True)
class Setting:
    """What the costs depend on, beside the layers."""

    num_draws: int
    num_blocks: int
    num_outputs: int
    pair_blocks: bool = True
    full: bool = False

    @property
    def pairs(self) -> int:
        """Products of draws for an entry, of layered features."""
        return self.num_draws**2 if self.pair_blocks else self.num_draws

    @property
    def products(self) -> int:
        """Products of slots for an entry, of formed features; standard errors included."""
        return self.num_blocks + 1 if self.pair_blocks else self.num_draws

    @property
    def slots(self) -> int:
        return self.num_blocks if self.pair_blocks else self.num_draws

    @property
    def copies(self) -> int:
        return self.num_outputs**2 if self.full else self.num_outputs

    @property
    def outputs_at_once(self) -> int:
        return self.num_outputs if self.full else 1


@dataclass(frozen=True)
class Cost:
    """Of a layer: multiply-adds of an entry, numbers of a row."""

    operations: int
    numbers: int


@dataclass(frozen=True)
class Contraction:
    """The plan of the exact parameters, and that of the sketched ones (None where there are none)."""

    exact: SitePlan
    sketched: SitePlan | None
    num_columns: int
    num_sketched: int

    @property
    def text(self) -> str:
        """The choice in words, for plan and report."""
        readout = self.exact.readout
        layers = [site.module for site in self.exact.outer if site.module != readout]
        means = [site.module for site in self.exact.outer if site.module == readout]
        kinds = {
            "layered": [module or "the model itself" for module in layers],
            "means": [module or "the model itself" for module in means] + list(self.exact.dense_names()),
            f"sketch (k = {self.num_columns})": [] if self.sketched is None else list(self.sketched.dense_names()),
        }
        return "contraction: " + "; ".join(f"{kind}: {listed(names)}" for kind, names in kinds.items() if names)


def contraction_of(
    plan: SitePlan, space: ParameterSpace, spec: KernelSpec, *, num_draws: int, num_outputs: int
) -> Contraction:
    """The contraction of a kernel made of gradients; `num_outputs` counts the outputs that the kernel is made of."""
    blocks = 1 if spec.kind == "local" else spec.blocks
    setting = Setting(num_draws, blocks, num_outputs, spec.pair_blocks, spec.outputs == "full")
    num_columns = columns_of_sketch(spec.sketch) if spec.pair_blocks else 0
    return choose_contraction(plan, space, spec.contraction, num_columns, setting)


def choose_contraction(
    plan: SitePlan, space: ParameterSpace, contraction: str, num_columns: int, setting: Setting
) -> Contraction:
    """The contraction of every layer; `num_columns` is k, 0 where no sketch may be taken.

    The exact plan keeps its `readout` where that layer's inputs stand for its gradients.
    """
    if not setting.pair_blocks or setting.full:
        plan = replace(plan, readout=None)
    cheapest, costs = _exact(plan, space, contraction, setting)
    names = frozenset[str]()
    if contraction == "sketch":
        names = plan.names()
    elif contraction == "auto" and num_columns and unaffordable(costs.values(), num_columns, setting):
        worth = setting.products * setting.copies * num_columns
        names = frozenset(name for group, cost in costs.items() for name in group if cost.operations > worth)
    if not names:
        return Contraction(cheapest, None, 0, 0)
    formed = plan.densified(frozenset(site.module for site in plan.outer))
    sizes = dict(zip(space.names, space.sizes, strict=True))
    return Contraction(
        cheapest.only(plan.names() - names), formed.only(names), num_columns, sum(sizes[name] for name in names)
    )


def _exact(
    plan: SitePlan, space: ParameterSpace, contraction: str, setting: Setting
) -> tuple[SitePlan, dict[tuple[str, ...], Cost]]:
    """The exact plan that is asked for, or the cheapest, and what it costs by parameters that go together."""
    sizes = dict(zip(space.names, space.sizes, strict=True))
    formed, costs = set[str](), dict[tuple[str, ...], Cost]()
    for site in plan.outer:
        names = tuple(name for _, name in site.parameters)
        means = _means_cost(sum(sizes[name] for name in names), setting)
        layered = _layered_cost(space, plan, site, setting)
        if contraction == "means" or (contraction != "layered" and means.operations < layered.operations):
            formed.add(site.module)
        costs[names] = means if site.module in formed else layered
    for name in plan.dense_names():
        costs[(name,)] = _means_cost(sizes[name], setting)
    return plan.densified(frozenset(formed)), costs


def _means_cost(num_parameters: int, setting: Setting) -> Cost:
    return Cost(
        setting.products * setting.copies * num_parameters, setting.slots * setting.outputs_at_once * num_parameters
    )


def _layered_cost(space: ParameterSpace, plan: SitePlan, site: Site, setting: Setting) -> Cost:
    inputs, units = linear_widths(space, site)
    if setting.pair_blocks and site.module in plan.input_layers:
        operations = inputs + setting.products * setting.copies * units
        return Cost(operations, setting.num_draws * (inputs + setting.outputs_at_once * units))
    if plan.readout == site.module:
        return Cost(setting.products * inputs, setting.slots * inputs)
    shared = shares_derivatives(plan, site, full=setting.full)
    return Cost(
        setting.pairs * (inputs + (1 if shared else setting.copies) * units + PAIR_OPERATIONS),
        setting.num_draws * (inputs + setting.outputs_at_once * units),
    )


def shares_derivatives(plan: SitePlan, site: Site, *, full: bool) -> bool:
    """Whether a layer's output gradients count once for all outputs (`nntk_dist.layers.penultimate`): where products
    are summed over these.
    """
    return plan.output_layers is not None and plan.output_layers.module == site.module and not full


def unaffordable(costs: Iterable[Cost], num_columns: int, setting: Setting) -> bool:
    """Whether exactness costs too much, both in memory and in operations."""
    costs = list(costs)
    sketched = setting.products * setting.copies * num_columns
    too_long = sum(cost.operations for cost in costs) > AFFORDABLE_OPERATIONS * sketched
    return too_long and 4 * sum(cost.numbers for cost in costs) > AFFORDABLE_BYTES


def linear_widths(space: ParameterSpace, site: Site) -> tuple[int, int]:
    """Return the lengths of h̃ and of δ of a Linear site."""
    shapes, names = dict(zip(space.names, space.shapes, strict=True)), dict(site.parameters)
    inputs = shapes[names["weight"]][1] if "weight" in names else 0
    return inputs + ("bias" in names), shapes[site.parameters[0][1]][0]


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
