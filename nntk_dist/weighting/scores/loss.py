"""The score `loss`: the negative loss on the reference batch, cross-entropy for labels, squared error for numbers.

Axes: s draws, n examples of the reference batch, C outputs.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from torch.nn import functional

from nntk_dist.errors import ArgumentError
from nntk_dist.weighting.scores.base import Score, ScoreBasis


@dataclass(frozen=True)
class LossRule:
    """Makes a `CrossEntropyScore` if targets are whole numbers, a `SquaredErrorScore` if they are floating point."""

    name: ClassVar[str] = "loss"
    compares_outputs: ClassVar[bool] = True
    shared_because: ClassVar[str] = (
        "the loss of an example would need its target, which must not be used for test examples"
    )

    def prepare(self, basis: ScoreBasis) -> Score:
        """Return the score. Raises: ArgumentError if targets are missing or do not fit the outputs."""
        targets, (count, outputs) = basis.targets, basis.outputs.shape
        if targets is None:
            raise ArgumentError(
                "weighting is 'loss', which needs targets of the reference batch; give targets with reference, one "
                "for each example"
            )
        came = f"weighting.targets are {targets.dtype} of shape {tuple(targets.shape)}"
        if targets.is_floating_point():
            values = targets.double().reshape(count, -1)
            if values.shape != basis.outputs.shape or not bool(torch.isfinite(values).all()):
                raise ArgumentError(
                    f"{came}; allowed for numbers: finite ones of shape ({count}, {outputs}), as the outputs"
                )
            return SquaredErrorScore(values)
        if targets.shape != (count,) or targets.is_complex() or targets.dtype == torch.bool:
            raise ArgumentError(
                f"{came}; allowed: labels, whole numbers of shape ({count},), or numbers, floating point"
            )
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= outputs:
            raise ArgumentError(
                f"weighting.targets are labels from {low} to {high}, and the model has {outputs} outputs; allowed: 0 "
                f"to {outputs - 1} (floating-point targets give a squared error instead)"
            )
        return CrossEntropyScore(targets.long())


@dataclass(frozen=True)
class CrossEntropyScore:
    """The negative mean cross-entropy of the softmax of the outputs and the labels of the reference batch."""

    labels: Int64[Tensor, " n"]

    def of(self, z: Tensor, base: Tensor, perturbed: Tensor) -> Float64[Tensor, " s"]:
        """Return one score for each draw."""
        logs = functional.log_softmax(perturbed, dim=2)
        return logs.gather(2, self.labels.expand(len(z), -1)[:, :, None]).mean((1, 2))


@dataclass(frozen=True)
class SquaredErrorScore:
    """The negative mean squared error over the reference batch and the outputs."""

    targets: Float64[Tensor, "n C"]

    def of(self, z: Tensor, base: Tensor, perturbed: Tensor) -> Float64[Tensor, " s"]:
        """Return one score for each draw."""
        return -(perturbed - self.targets).square().mean((1, 2))
