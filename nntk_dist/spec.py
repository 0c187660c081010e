"""What a kernel is, whatever the model and the data: `KernelSpec`, checked when it is made.

The words are those of the section `kernel` of a configuration and of the public functions. Which estimator computes it
for a given model is decided in `nntk_dist.resolution`; no model is met here.

Axes: none.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from nntk_dist.block_sums import Meeting
from nntk_dist.distributions import make_distribution
from nntk_dist.drawing import GROUP_SIZES, MINIMUM_BLOCKS, Drawing, automatic_draws, blocks_message
from nntk_dist.errors import NNTKError, check_choice
from nntk_dist.parameters import ParameterSpace
from nntk_dist.statistics import STATISTICS

KINDS = ("nonlocal", "covariance", "averaged", "local")
ESTIMATORS = ("auto", "weight", "autodiff")
SCALES = ("localized", "raw")


@dataclass(frozen=True)
class KernelSpec:
    """A kernel, whatever the model and the data: the arguments of the public functions and of the section `kernel`."""

    kind: str = "nonlocal"
    gamma: float = 0.05
    distribution: str = "gaussian"
    estimator: str = "auto"
    statistic: str = "both"
    design: str = "iid"
    draws: int | str = "auto"
    blocks: int = 8
    parameters: Sequence[str] = ("*",)
    outputs: str | int = "trace"
    scale: str = "localized"
    seed: int = 0

    def __post_init__(self) -> None:
        self._take_integers()
        patterns = (self.parameters,) if isinstance(self.parameters, str) else tuple(self.parameters)
        object.__setattr__(self, "parameters", patterns)
        check_choice("kind", self.kind, KINDS)
        check_choice("estimator", self.estimator, ESTIMATORS)
        check_choice("statistic", self.statistic, STATISTICS)
        check_choice("scale", self.scale, SCALES)
        if isinstance(self.outputs, str):
            check_choice("outputs", self.outputs, ("trace", "full"))
        if isinstance(self.draws, str):
            check_choice("draws", self.draws, ("auto",))
        check_choice("design", self.design, GROUP_SIZES)
        if self.kind != "local" and self.blocks < MINIMUM_BLOCKS:
            raise NNTKError(blocks_message(self.blocks))
        if self.kind == "covariance" and self.estimator == "autodiff":
            raise NNTKError(
                "estimator is 'autodiff'; allowed for kind covariance, which is made of differences: auto, weight"
            )
        if self.kind in ("averaged", "local") and self.estimator == "weight":
            raise NNTKError(
                f"estimator is 'weight'; allowed for kind {self.kind}, which is made of gradients: auto, autodiff"
            )

    def _take_integers(self) -> None:
        """Accept any integer type (NumPy's too) as an int, and nothing else: None must not pass for `trace`."""
        for name, words in (("draws", "auto"), ("outputs", "trace, full"), ("blocks", ""), ("seed", "")):
            value = getattr(self, name)
            if isinstance(value, str) and words:
                continue
            try:
                object.__setattr__(self, name, operator.index(value))
            except TypeError:
                allowed = f"a whole number{f' or {words}' if words else ''}"
                raise NNTKError(f"{name} is {value!r}; allowed: {allowed}") from None

    @property
    def pair_blocks(self) -> bool:
        """Whether products of different blocks count: in the nonlocal kernel alone."""
        return self.kind == "nonlocal"

    @property
    def meeting(self) -> Meeting:
        return Meeting(full=self.outputs == "full")

    def drawing(self, estimator: str, space: ParameterSpace, model: nn.Module) -> Drawing:
        """The perturbations of this kernel's selected parameters of a model, under an estimator."""
        draws = automatic_draws(estimator, self.blocks, self.design) if isinstance(self.draws, str) else self.draws
        return Drawing(
            distribution=make_distribution(self.distribution, self.gamma),
            num_draws=draws,
            num_blocks=self.blocks,
            num_parameters=space.num_parameters,
            design=self.design,
            seed=self.seed,
        )
