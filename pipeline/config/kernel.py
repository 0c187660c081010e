"""The section `kernel` of the configuration: which kernel, by which estimator, from how many draws.

The words and checks of `nntk_dist.spec.KernelSpec`, said in terms of keys. It computes nothing.
"""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from nntk_dist.errors import NNTKError
from nntk_dist.sampling.designs import GROUP_SIZES, check_combination
from nntk_dist.sampling.laws import make_distribution
from nntk_dist.statistics.required_draws import check_accuracy
from nntk_dist.weighting.options import Weighting, check_weighting
from pipeline.config.types import Count, CountOrAuto, Flag, Names, PositiveNumber, Section, Seed


class DistributionConfig(Section):
    """The law rho of the perturbations; `gamma` is their range: E|z|^2 = P gamma^2 / 2.

    With `gamma_scale` relative the range is per tensor, in units of its root mean square. An option that is null takes
    its distribution's default.
    """

    name: Literal["gaussian", "sphere", "ball", "fractional", "student", "lowrank"] = "gaussian"
    gamma: PositiveNumber = 0.05
    gamma_scale: Literal["absolute", "relative"] = "absolute"
    alpha: Annotated[
        float | None,
        Field(ge=0, lt=1, description="a number from 0 to below 1, for distribution fractional; null for 0.5"),
    ] = None
    nu: Annotated[
        float | None,
        Field(gt=2, allow_inf_nan=False, description="a number above 2, for distribution student; null for 5"),
    ] = None
    rank: Annotated[
        int | None, Field(ge=1, description="a whole number, 1 or more, for distribution lowrank; null for 1")
    ] = None

    @model_validator(mode="after")
    def _options_fit_name(self) -> Self:
        try:
            make_distribution(self.name, self.gamma, alpha=self.alpha, nu=self.nu, rank=self.rank)
        except NNTKError as error:
            raise ValueError(f"kernel.distribution.{error}") from error
        return self


class WeightingConfig(Section):
    """How the draws of a block are weighted against each other: by the softmax of a score over the temperature.

    `dimension` is that of queries and keys (parameter), `reference` the number of training examples that scores are
    compared on (all other scores). Infinity weights all draws alike; it is kept as null, which JSON has.
    """

    name: Annotated[
        Literal["fixed", "parameter", "output", "loss"] | Annotated[str, Field(pattern=r"^python:.+:.+$")],
        Field(description="fixed, parameter, output, loss, or python:module:function"),
    ] = "fixed"
    temperature: Annotated[
        float | None, Field(gt=0, description="a number above 0, or .inf or null for equal weights")
    ] = 1.0
    per_example: Flag = False
    dimension: Count = 16
    reference: Count = 256

    @field_validator("temperature")
    @classmethod
    def _infinity_is_null(cls, value: float | None) -> float | None:
        return None if value is None or math.isinf(value) else value

    @model_validator(mode="after")
    def _options_fit_name(self) -> Self:
        try:
            self.weighting()
        except NNTKError as error:
            raise ValueError(f"kernel.{error}") from error
        return self

    def weighting(self) -> Weighting:
        """The library's words."""
        return Weighting(self.name, self.temperature, self.per_example, self.dimension, self.reference)


class KernelConfig(Section):
    """Which kernel, by which estimator, from how many draws."""

    kind: Literal["nonlocal", "covariance", "averaged", "local"] = "nonlocal"
    distribution: DistributionConfig = DistributionConfig()
    weighting: WeightingConfig = WeightingConfig()
    estimator: Literal["auto", "weight", "autodiff", "activation"] = "auto"
    statistic: Literal["plugin", "unbiased", "both"] = "both"
    design: Literal["iid", "antithetic", "orthogonal"] = "iid"
    draws: CountOrAuto = "auto"
    blocks: Annotated[
        int,
        Field(
            ge=1, description="a whole number, 4 or more (the standard error needs four; design orthogonal has fewer)"
        ),
    ] = 8
    rtol: Annotated[
        float | None,
        Field(gt=0, lt=1, description="null, or a number above 0 and below 1, such as 0.05"),
    ] = None
    max_draws: Count = 65536
    parameters: Annotated[Names, Field(description="a list of one or more name patterns, such as ['*.weight']")] = (
        "*",
    )
    outputs: Annotated[
        Literal["trace", "full"] | Annotated[int, Field(ge=0)],
        Field(description="trace, full, or the index of one output, 0 or more"),
    ] = "trace"
    scale: Literal["localized", "raw"] = "localized"
    seed: Seed = 0
    contraction: Literal["auto", "layered", "means", "sketch"] = "auto"
    sketch: CountOrAuto = "auto"

    @model_validator(mode="after")
    def _estimator_fits_kind(self) -> Self:
        right = {"covariance": "weight", "averaged": "autodiff", "local": "autodiff"}.get(self.kind)
        if right is not None and self.estimator not in ("auto", right):
            made_of = "gradients" if right == "autodiff" else "differences of outputs"
            raise ValueError(
                f"kernel.estimator is '{self.estimator}', but kind {self.kind} is made of {made_of}; allowed: auto, "
                f"{right}"
            )
        return self

    @model_validator(mode="after")
    def _words_go_together(self) -> Self:
        try:
            check_combination(
                kind=self.kind,
                estimator=self.estimator,
                statistic=self.statistic,
                distribution=self.distribution.name,
                gamma_scale=self.distribution.gamma_scale,
                design=self.design,
                blocks=self.blocks,
            )
            check_weighting(self.weighting.weighting(), kind=self.kind, estimator=self.estimator)
        except NNTKError as error:
            within = "distribution." if str(error).startswith("gamma_scale") else ""
            raise ValueError(f"kernel.{within}{error}") from error
        return self

    @model_validator(mode="after")
    def _accuracy_can_be_looked_for(self) -> Self:
        try:
            check_accuracy(self.rtol, self.max_draws, kind=self.kind, blocks=self.blocks, draws=self.draws)
        except NNTKError as error:
            raise ValueError(f"kernel.{error}") from error
        return self

    @model_validator(mode="after")
    def _draws_fill_blocks(self) -> Self:
        if self.kind == "local" or isinstance(self.draws, str):
            return self
        unit = self.blocks * GROUP_SIZES[self.design]
        if self.draws % unit:
            lower = self.draws - self.draws % unit
            nearest = f"{lower} or {lower + unit}" if lower else f"{unit}"
            raise ValueError(
                f"kernel.draws is {self.draws}, which does not fill {self.blocks} blocks (design {self.design}); "
                f"allowed: auto, or a multiple of {unit}, the nearest: {nearest}"
            )
        return self
