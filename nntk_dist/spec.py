"""What a kernel is, whatever the model and the data: `KernelSpec`, checked when it is made.

The words are those of the section `kernel` of a configuration and of the public functions. Which estimator computes it
for a given model is decided in `nntk_dist.planning.decision`; no model is met here.

Axes: none.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from torch import nn

from nntk_dist.errors import NNTKError, check_choice
from nntk_dist.layers.sketch import columns_of_sketch
from nntk_dist.models.parameters import ParameterSpace
from nntk_dist.products.block_sums import Meeting
from nntk_dist.sampling.designs import automatic_draws, check_combination, group_size
from nntk_dist.sampling.draws import Drawing
from nntk_dist.sampling.laws import OPTIONS, Distribution, Student, make_distribution
from nntk_dist.statistics.estimates import STATISTICS
from nntk_dist.statistics.required_draws import check_accuracy
from nntk_dist.weighting.options import Weighting, as_weighting, check_weighting

KINDS = ("nonlocal", "covariance", "averaged", "local")
ESTIMATORS = ("auto", "weight", "autodiff", "activation")
CONTRACTIONS = ("auto", "layered", "means", "sketch")
SCALES = ("localized", "raw")


@dataclass(frozen=True)
class KernelSpec:
    """A kernel, whatever the model and the data: the arguments of the public functions and of the section `kernel`.

    `distribution` may be given as a mapping of its name and options; it is kept as the name, the options beside it.
    `weighting` may be given in any of the forms that `as_weighting` takes.
    """

    kind: str = "nonlocal"
    gamma: float = 0.05
    distribution: str | Mapping[str, Any] = "gaussian"
    estimator: str = "auto"
    statistic: str = "both"
    design: str = "iid"
    draws: int | str = "auto"
    blocks: int = 8
    parameters: Sequence[str] = ("*",)
    outputs: str | int = "trace"
    scale: str = "localized"
    seed: int = 0
    gamma_scale: str = "absolute"
    alpha: float | None = None
    nu: float | None = None
    rank: int | None = None
    contraction: str = "auto"
    sketch: int | str = "auto"
    rtol: float | None = None
    max_draws: int = 65536
    weighting: Weighting = field(default_factory=Weighting)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weighting", as_weighting(self.weighting))
        self._take_integers()
        self._take_distribution()
        patterns = (self.parameters,) if isinstance(self.parameters, str) else tuple(self.parameters)
        object.__setattr__(self, "parameters", patterns)
        check_choice("kind", self.kind, KINDS)
        check_choice("estimator", self.estimator, ESTIMATORS)
        check_choice("statistic", self.statistic, STATISTICS)
        check_choice("scale", self.scale, SCALES)
        self._check_contraction()
        check_accuracy(self.rtol, self.max_draws, kind=self.kind, blocks=self.blocks, draws=self.draws)
        if isinstance(self.outputs, str):
            check_choice("outputs", self.outputs, ("trace", "full"))
        if isinstance(self.draws, str):
            check_choice("draws", self.draws, ("auto",))
        check_combination(
            kind=self.kind,
            estimator=self.estimator,
            statistic=self.statistic,
            distribution=self.law.name,
            gamma_scale=self.gamma_scale,
            design=self.design,
            blocks=self.blocks,
        )
        check_weighting(self.weighting, kind=self.kind, estimator=self.estimator)
        if self.kind == "covariance" and self.estimator in ("autodiff", "activation"):
            raise NNTKError(
                f"estimator is '{self.estimator}'; allowed for kind covariance, which is made of differences: auto, "
                "weight"
            )
        if self.kind in ("averaged", "local") and self.estimator in ("weight", "activation"):
            raise NNTKError(
                f"estimator is '{self.estimator}'; allowed for kind {self.kind}, which is made of gradients: auto, "
                "autodiff"
            )

    def _check_contraction(self) -> None:
        """A contraction needs gradients, a sketch the pairs of blocks whose scatter tells its error."""
        check_choice("contraction", self.contraction, CONTRACTIONS)
        if self.contraction != "auto" and (self.kind == "covariance" or self.estimator == "weight"):
            what = "kind covariance" if self.kind == "covariance" else "estimator weight"
            raise NNTKError(f"contraction is '{self.contraction}'; allowed for {what}, made of differences: auto")
        if self.contraction == "sketch" and not self.pair_blocks:
            raise NNTKError(
                f"contraction is 'sketch'; allowed for kind {self.kind}: auto, layered, means (only kind nonlocal "
                "knows the sketch's error)"
            )
        if isinstance(self.sketch, str):
            check_choice("sketch", self.sketch, ("auto",))
        elif self.contraction not in ("auto", "sketch") or not self.pair_blocks:
            what = f"kind {self.kind}" if not self.pair_blocks else f"contraction {self.contraction}"
            raise NNTKError(f"sketch is {self.sketch}; allowed for {what}, which sketches nothing: auto")
        if self.pair_blocks:
            columns_of_sketch(self.sketch)

    def _take_integers(self) -> None:
        """Accept any integer type (NumPy's too) as an int, and nothing else: None must not pass for `trace`."""
        named = {"draws": "auto", "outputs": "trace, full", "blocks": "", "seed": "", "sketch": "auto", "max_draws": ""}
        for name, words in named.items():
            value = getattr(self, name)
            if isinstance(value, str) and words:
                continue
            try:
                object.__setattr__(self, name, operator.index(value))
            except TypeError:
                allowed = f"a whole number{f' or {words}' if words else ''}"
                raise NNTKError(f"{name} is {value!r}; allowed: {allowed}") from None

    def _take_distribution(self) -> None:
        """Unpack a mapping, and make the law once: so that whatever is wrong with it is said now."""
        if isinstance(self.distribution, Mapping):
            allowed = ("name", *OPTIONS)
            for key, value in self.distribution.items():
                check_choice("a key of distribution", key, allowed)
                if key != "name":
                    object.__setattr__(self, key, value)
            object.__setattr__(self, "distribution", self.distribution.get("name", "gaussian"))
        for option in OPTIONS:
            value = getattr(self, option)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Real):
                raise NNTKError(f"{option} is {value!r}; allowed: a number")
            object.__setattr__(self, option, int(value) if isinstance(value, Integral) else float(value))
        _ = self.law

    @property
    def law(self) -> Distribution:
        """The distribution with its range and options. Raises: NNTKError as `make_distribution`."""
        assert isinstance(self.distribution, str)
        return make_distribution(self.distribution, self.gamma, alpha=self.alpha, nu=self.nu, rank=self.rank)

    @property
    def pair_blocks(self) -> bool:
        """Whether products of different blocks count: in the nonlocal kernel alone."""
        return self.kind == "nonlocal"

    @property
    def meeting(self) -> Meeting:
        return Meeting(full=self.outputs == "full")

    def draw_unit(self, draws: int, num_parameters: int) -> int:
        """Draws of one group in every block, at a design's group size for so many draws."""
        return self.blocks * group_size(self.design, draws // self.blocks, num_parameters)

    def _within_max(self, draws: int, num_parameters: int) -> int:
        """What a search for an asked accuracy begins with: `draws`, or as many whole groups as `max_draws` allows."""
        unit = self.draw_unit(draws, num_parameters)
        if self.max_draws < unit:
            raise NNTKError(
                f"max_draws is {self.max_draws}; allowed: {unit} or more, one group of design {self.design} in each of "
                f"{self.blocks} blocks"
            )
        return min(draws, self.max_draws // unit * unit)

    def drawing(self, estimator: str, space: ParameterSpace, model: nn.Module) -> Drawing:
        """The perturbations of this kernel's selected parameters of a model, under an estimator.

        Raises: NNTKError where the draws don't fill the blocks, a tensor has no scale, or Student's ν is too small for
        the model's depth.
        """
        count = space.num_parameters
        draws = self.draws
        if isinstance(draws, str):
            draws = automatic_draws(estimator, self.blocks, self.design, count)
            if self.rtol is not None:
                draws = self._within_max(draws, count)
        law = self.law
        if isinstance(law, Student):
            _check_moments(law, space.num_weight_layers)
        return Drawing(
            distribution=law,
            num_draws=draws,
            num_blocks=self.blocks,
            num_parameters=count,
            design=self.design,
            seed=self.seed,
            shapes=space.shapes,
            scales=space.scales(model) if self.gamma_scale == "relative" else (),
        )


def _check_moments(law: Student, num_layers: int) -> None:
    """Where f grows like |θ|^L, the variance of a draw takes moments of z up to 2(L − 1)."""
    smallest = 2 * (num_layers - 1)
    if law.nu <= smallest:
        raise NNTKError(
            f"nu is {law.nu:g}, but {num_layers} layers of weights are perturbed, and f may grow like their product; "
            f"allowed: above {smallest}, where its variance is finite, or another distribution"
        )
