"""Sites (modules whose parameters have a gradient rule), and the plan of how each parameter's gradient is made.

Values only: no model is evaluated here. `nntk_dist.layers.site_trial` makes and checks a plan.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class OutputLayers:
    """The last two Linear layers of a model: the one before the readout, and the readout."""

    module: str
    readout: str


@dataclass(frozen=True)
class Site:
    """One module and its selected parameters, as pairs (attribute in the module, name in the parameter space).

    Attributes:
        module: its path in the model.
        parameters: the pairs.
        common: the shape of the input of its calls, if they have one row for all examples, as position embeddings do.
    """

    module: str
    parameters: tuple[tuple[str, str], ...]
    common: tuple[int, ...] | None = None

    @property
    def attributes(self) -> tuple[str, ...]:
        """The selected attributes, such as `weight`."""
        return tuple(attribute for attribute, _ in self.parameters)


@dataclass(frozen=True)
class SitePlan:
    """How the gradient of every selected parameter is made; each parameter belongs to exactly one of the first three.

    Attributes:
        outer: Linear sites called once, on one vector per example: their gradient is δ ⊗ h̃ and stays in two factors.
        dense: sites whose per-example gradient a rule forms.
        whole: parameters that are differentiated as a whole, one example at a time.
        output_layers: the last two Linear layers, if both are outer and all outputs share the former's derivatives
            (`nntk_dist.layers.penultimate`).
        readout: the outer site whose output is the model's output; its δ is the identity.
        input_layers: outer sites whose h̃ no parameter changes, because it is the model's input itself, or 1 if the
            bias alone is selected.
        whole_in_turn: whether the examples are differentiated one after the other, because vmap cannot take the model.
    """

    outer: tuple[Site, ...]
    dense: tuple[Site, ...]
    whole: tuple[str, ...]
    output_layers: OutputLayers | None = None
    readout: str | None = None
    input_layers: frozenset[str] = frozenset()
    whole_in_turn: bool = False

    def dense_names(self) -> tuple[str, ...]:
        """Parameters whose gradient is formed, in a fixed order."""
        return tuple(dict.fromkeys(name for site in self.dense for _, name in site.parameters)) + self.whole

    def names(self) -> frozenset[str]:
        """All parameters of the plan."""
        return frozenset(name for site in self.outer for _, name in site.parameters) | frozenset(self.dense_names())

    def only(self, names: frozenset[str]) -> "SitePlan":
        """The plan of these parameters alone."""

        def keep(sites: tuple[Site, ...]) -> tuple[Site, ...]:
            pruned = [replace(s, parameters=tuple(p for p in s.parameters if p[1] in names)) for s in sites]
            return tuple(site for site in pruned if site.parameters)

        whole = tuple(name for name in self.whole if name in names)
        return replace(self, outer=keep(self.outer), dense=keep(self.dense), whole=whole)

    def densified(self, modules: frozenset[str]) -> "SitePlan":
        """The same plan with the outer sites of these modules formed densely."""
        moved = tuple(site for site in self.outer if site.module in modules)
        return replace(self, outer=tuple(s for s in self.outer if s.module not in modules), dense=self.dense + moved)
