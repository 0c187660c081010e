"""`KernelSpec`: every option of a kernel, declared once with its type, default, check and description.

Axes: P parameters; S draws in R blocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

from torch import nn

from nntk_dist.errors import ArgumentError
from nntk_dist.models.parameters import ParameterSpace
from nntk_dist.products.block_sums import Meeting
from nntk_dist.registration.estimators import ESTIMATORS
from nntk_dist.registration.options import (
    Automatic,
    Choice,
    Converted,
    NamesOrGroups,
    Number,
    Registered,
    WholeNumber,
    convert_options,
    option,
    options_of,
)
from nntk_dist.sampling.designs import Design, automatic_draws, group_size
from nntk_dist.sampling.draws import Drawing
from nntk_dist.sampling.laws import Law, Student, as_law, has_gamma
from nntk_dist.spec.choices import (
    ContractionChoice,
    EstimatorChoice,
    GammaScale,
    Kind,
    Outputs,
    Scale,
    Statistic,
    VarianceReduction,
)
from nntk_dist.spec.combinations import check_combinations
from nntk_dist.weighting.options import Weighting, as_weighting
from nntk_dist.weighting.scores.base import ScoreFunction

# Which kinds have an option: the signature of each public function has the options of its kind.
_ALL = frozenset(Kind)
_DRAWN = frozenset((Kind.NONLOCAL, Kind.COVARIANCE, Kind.AVERAGED))
_NONLOCAL = frozenset((Kind.NONLOCAL,))
_GRADIENTS = frozenset((Kind.NONLOCAL, Kind.AVERAGED, Kind.LOCAL))
_SKETCHED = frozenset((Kind.NONLOCAL, Kind.LOCAL))
_LARGEST_SEED = 2**63


def _as_group(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError
    return value


@dataclass(frozen=True)
class KernelSpec:
    """A kernel, for any model and data.

    The fields are the options of the public functions and of the section `kernel` of a configuration. Names and
    mappings are converted to objects: `distribution="student"` to `Student(...)`, text to enums. A declaration says
    which kinds have the option (`kinds`), a different default of the public functions (`in_call`), a different default
    of the configuration (`in_configuration`), the section of its key, and the type of the argument.

    Raises:
        ArgumentError: an option is not allowed, alone or beside the others.

    Example:
        >>> KernelSpec(gamma=0.1, distribution="sphere").distribution
        Sphere(gamma=0.1)
    """

    kind: str = option(Kind.NONLOCAL, Choice(Kind), "which kernel", kinds=frozenset())
    gamma: InitVar[float | None] = option(
        None,
        Number(above=0, none=True),
        "range γ of the perturbations, E|z|² = P·γ²/2; needed unless the distribution has its own",
        kinds=_DRAWN,
        section="distribution",
        in_configuration=0.05,
        argument=float | None,
    )
    distribution: Law = option(
        "gaussian",
        Converted(lambda law: law, text="a name, a mapping of name and options, or a law such as Student(gamma=0.1)"),
        "law of the perturbations",
        kinds=_DRAWN,
        argument=str | Mapping[str, Any] | Law,
    )
    gamma_scale: str = option(
        GammaScale.ABSOLUTE,
        Choice(GammaScale),
        "whether γ is one length, or relative to the root mean square of each tensor",
        kinds=_DRAWN,
        section="distribution",
    )
    estimator: str = option(
        EstimatorChoice.AUTO,
        Registered(EstimatorChoice, ESTIMATORS),
        "how nonlocal gradients are estimated",
        kinds=_NONLOCAL,
    )
    variance_reduction: str = option(
        VarianceReduction.AUTO,
        Choice(VarianceReduction),
        "auto: the estimator activation integrates noise and subtracts control variates, if the model allows it; all: "
        "weight subtracts them too, if a trial says that they pay",
        kinds=_NONLOCAL,
    )
    statistic: str = option(
        Statistic.BOTH,
        Choice(Statistic),
        "plugin is PSD and inflated by noise; unbiased is right on average and not PSD",
        kinds=_NONLOCAL,
        in_call=Statistic.UNBIASED,
    )
    design: str = option(Design.IID, Choice(Design), "how draws depend on each other", kinds=_DRAWN)
    draws: int | str = option(
        Automatic.AUTO,
        WholeNumber(1, choices=Automatic),
        "number of perturbed models S; auto: one group of draws in each block for autodiff, else as many as a pilot "
        "expects to give an error of 5 %, between 32 and 256",
        kinds=_DRAWN,
    )
    blocks: int = option(
        8,
        WholeNumber(1, text="a whole number, 4 or more (the standard error needs four; design orthogonal has fewer)"),
        "number of independent blocks R that the draws are divided into",
        kinds=_DRAWN,
    )
    rtol: float | None = option(
        None,
        Number(above=0, below=1, none=True, text="{none}, or a number above 0 and below 1, such as 0.05"),
        "relative error to reach by adding draws, by a 95 % bound",
        kinds=_DRAWN,
    )
    max_draws: int = option(65536, WholeNumber(1), "most draws that rtol may take", kinds=_DRAWN)
    outputs: int | str = option(
        Outputs.TRACE,
        WholeNumber(0, choices=Outputs, text="the index of one output, 0 or more"),
        "sum over the model's outputs, all pairs of outputs, or one output",
        kinds=_ALL,
    )
    scale: str = option(Scale.LOCALIZED, Choice(Scale), "P·G f, which tends to ∇f, or G f", kinds=_DRAWN)
    weighting: Weighting = option(
        Weighting(),
        Converted(as_weighting, text="a name, a mapping of name and options, a function, or a Weighting"),
        "how the draws of a block are weighted by a score",
        kinds=_NONLOCAL,
        in_call=None,
        argument=str | Mapping[str, Any] | ScoreFunction | Weighting | None,
    )
    contraction: str = option(
        ContractionChoice.AUTO,
        Choice(ContractionChoice),
        "how products of gradients are formed",
        kinds=_GRADIENTS,
    )
    sketch: int | str = option(
        Automatic.AUTO,
        WholeNumber(1, choices=Automatic),
        "numbers of a sketch for each block; for kind local a number asks for a sketch",
        kinds=_SKETCHED,
    )
    output_projections: int | str = option(
        Automatic.AUTO,
        WholeNumber(0, choices=Automatic),
        "random directions of the outputs that a sketch of gradients takes in place of each output; 0: none; auto: a "
        "sixteenth of the sketch, if there are at least four times as many outputs; only for outputs: trace",
        kinds=_SKETCHED,
    )
    parameters: Sequence[str] | Mapping[str, Sequence[str]] = option(
        ("*",),
        NamesOrGroups(
            text="a list of one or more name patterns, such as ['*.weight'], or a mapping of group names (letters, "
            "digits, _, - and .) to such lists"
        ),
        "the parameters that are perturbed, by shell-style patterns; a mapping of group names to patterns gives a "
        "kernel for each group",
        kinds=_ALL,
    )
    group: str | None = option(
        None,
        Converted(_as_group, text="null, or the name of a group"),
        "the group of parameters whose kernel this is; a run of all groups sets it for each",
        kinds=frozenset(),
        only_in_configuration=True,
    )
    seed: int = option(
        0,
        WholeNumber(0, below=_LARGEST_SEED, text="a whole number from 0 to 2^63 - 1"),
        "seed of all random numbers",
        kinds=_ALL,
    )

    def __post_init__(self, gamma: float | None) -> None:
        convert_options(self)
        if gamma is None and not has_gamma(self.distribution):
            gamma = options_of(self)["gamma"].facts["in_configuration"]
        object.__setattr__(self, "distribution", as_law(self.distribution, gamma))
        check_combinations(self)

    @property
    def pair_blocks(self) -> bool:
        """Whether products of different blocks count: only in the nonlocal kernel."""
        return self.kind == Kind.NONLOCAL

    @property
    def group_names(self) -> tuple[str, ...]:
        """The names of the groups of parameters, if there are groups."""
        return tuple(self.parameters) if isinstance(self.parameters, Mapping) else ()

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of the groups that each have a kernel; none if there is one kernel."""
        return () if self.group is not None else self.group_names

    @property
    def may_sketch(self) -> bool:
        """Whether a sketch may be made: of kind nonlocal also if `contraction` is auto, of kind local only if asked."""
        asked = self.contraction == ContractionChoice.SKETCH or self.sketch != Automatic.AUTO
        return self.kind == Kind.NONLOCAL or (self.kind == Kind.LOCAL and asked)

    @property
    def meeting(self) -> Meeting:
        """How the outputs of two examples meet."""
        return Meeting(full=self.outputs == Outputs.FULL)

    def draw_unit(self, draws: int, num_parameters: int) -> int:
        """Return the draws of one group in every block, at the design's group size for this number of draws."""
        return self.blocks * group_size(self.design, draws // self.blocks, num_parameters)

    def _within_max(self, draws: int, num_parameters: int) -> int:
        """Return the draws that a search for an accuracy begins with: whole groups, at most `max_draws`."""
        unit = self.draw_unit(draws, num_parameters)
        if self.max_draws < unit:
            raise ArgumentError(
                f"max_draws is {self.max_draws}; allowed: {unit} or more, one group of design {self.design} in each of "
                f"{self.blocks} blocks"
            )
        return min(draws, self.max_draws // unit * unit)

    def drawing(self, estimator: str, space: ParameterSpace, model: nn.Module) -> Drawing:
        """Return the perturbations of the selected parameters of a model.

        Args:
            estimator: the estimator that was decided on, which fixes `draws: auto`.
            space: the selected parameters.
            model: the model, from which a relative γ takes the scale of each tensor.

        Raises:
            ArgumentError: the draws do not fill the blocks, a tensor has no scale, or Student's ν is too small for
                the depth of the model.
        """
        count = space.num_parameters
        draws = self.draws
        if isinstance(draws, str):
            of_gradients = ESTIMATORS.get(estimator).uses_gradients
            draws = automatic_draws(self.blocks, self.design, count, of_gradients=of_gradients)
            if self.rtol is not None:
                draws = self._within_max(draws, count)
        if isinstance(self.distribution, Student):
            _check_moments(self.distribution, space.num_weight_layers)
        return Drawing(
            distribution=self.distribution,
            num_draws=draws,
            num_blocks=self.blocks,
            num_parameters=count,
            design=self.design,
            seed=self.seed,
            shapes=space.shapes,
            scales=space.scales(model) if self.gamma_scale == GammaScale.RELATIVE else (),
        )


def _check_moments(law: Student, num_layers: int) -> None:
    """If f grows like |θ|^L, the variance of a draw needs moments of z up to 2(L − 1)."""
    smallest = 2 * (num_layers - 1)
    if law.nu <= smallest:
        raise ArgumentError(
            f"nu is {law.nu:g}, but {num_layers} layers of weights are perturbed, and f may grow like their product; "
            f"allowed: above {smallest}, for which its variance is finite, or another distribution"
        )
