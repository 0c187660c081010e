"""The section `kernel` of the configuration: which kernel, by which estimator, from how many draws.

The words and checks of `nntk_dist.spec.KernelSpec`, said in terms of keys. It computes nothing.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nntk_dist.drawing import GROUP_SIZES
from pipeline.config_types import Count, CountOrAuto, Names, PositiveNumber, Section, Seed


class DistributionConfig(Section):
    """The density rho of the perturbations; `gamma` is their range: E|z|^2 = P gamma^2 / 2."""

    name: Literal["gaussian"] = "gaussian"
    gamma: PositiveNumber = 0.05


class WeightingConfig(Section):
    """How the draws of a block are weighted against each other."""

    name: Literal["fixed"] = "fixed"


class KernelConfig(Section):
    """Which kernel, by which estimator, from how many draws."""

    kind: Literal["nonlocal", "covariance", "averaged", "local"] = "nonlocal"
    distribution: DistributionConfig = DistributionConfig()
    weighting: WeightingConfig = WeightingConfig()
    estimator: Literal["auto", "weight", "autodiff"] = "auto"
    statistic: Literal["plugin", "unbiased", "both"] = "both"
    design: Literal["iid", "antithetic"] = "iid"
    draws: CountOrAuto = "auto"
    blocks: Annotated[
        int, Field(ge=4, description="a whole number, 4 or more (the standard error needs four blocks)")
    ] = 8
    rtol: Annotated[None, Field(description="null")] = None
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

    @model_validator(mode="after")
    def _estimator_fits_kind(self) -> Self:
        wrong = {"covariance": "autodiff", "averaged": "weight", "local": "weight"}.get(self.kind)
        if self.estimator == wrong:
            made_of, right = ("gradients", "autodiff") if wrong == "weight" else ("differences of outputs", "weight")
            raise ValueError(
                f"kernel.estimator is '{wrong}', but kind {self.kind} is made of {made_of}; allowed: auto, {right}"
            )
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
