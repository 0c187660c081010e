"""Scores of draws, by which attention weights them: of parameters, of outputs, of the loss, or anyone's function.

The interface first; each score is a small class of its own. A score is a function of one draw (and one example, where
each has its own) and of nothing else: it neither draws perturbations nor evaluates the model, both are handed over.
What the paper's scores are is known from its abstract alone: `output` and `loss` are this project's definitions.

Axes: s draws, n examples (of the reference batch, or of the batch at hand where each has its own score), C outputs, P
parameters, k = d_k numbers of a query or key.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from torch.nn import functional

from nntk_dist.errors import NNTKError
from nntk_dist.registration.callables import import_function
from nntk_dist.runtime.memory import is_out_of_memory
from nntk_dist.sampling.philox import normal
from nntk_dist.sampling.streams import KEY_DRAW, QUERY_DRAW, Stream
from nntk_dist.weighting.options import PYTHON, Reference, ScoreFunction, Weighting

_SLICE_ELEMENTS = 1 << 18


class Score(Protocol):
    """What weights are made of: the larger a draw's score, the larger its weight."""

    def of(
        self, z: Float64[Tensor, "s P"], base: Float64[Tensor, "n C"], perturbed: Float64[Tensor, "s n C"]
    ) -> Float64[Tensor, "s *n"]:
        """Scores of the draws that moved θ by z and the outputs from `base` to `perturbed`: (s,), or (s, n)."""
        ...


@dataclass(frozen=True)
class ParameterScore:
    """⟨Qθ, Kθ_s⟩/√d_k, which is ⟨w, θ_s⟩/√d_k with w = KᵀQθ: one vector of length P, and P multiply-adds a draw.

    Scores differ by about rms(θ)·γ/√2 from draw to draw, so that a temperature of that size is where they matter.
    """

    theta: Float64[Tensor, " P"]
    direction: Float64[Tensor, " P"]
    dimension: int

    def of(self, z: Tensor, base: Tensor, perturbed: Tensor) -> Float64[Tensor, " s"]:
        return (z @ self.direction + self.theta @ self.direction) / math.sqrt(self.dimension)


@dataclass(frozen=True)
class OutputScore:
    """−mean_i |f(x_i;θ_s) − f(x_i;θ)|² / m over the reference batch, m = mean_i |f(x_i;θ)|² there; with `per_example`
    −|f(x;θ_s) − f(x;θ)|² / m for every example x, m as before. 0 for outputs that did not move, −1 for those that moved
    by as much as they are.
    """

    mean_square: float
    per_example: bool

    def of(self, z: Tensor, base: Tensor, perturbed: Tensor) -> Float64[Tensor, "s *n"]:
        distances = (perturbed - base).square().sum(2) / -self.mean_square
        return distances if self.per_example else distances.mean(1)


@dataclass(frozen=True)
class CrossEntropyScore:
    """Minus the mean cross-entropy of the softmax of the outputs with the labels of the reference batch."""

    labels: Int64[Tensor, " n"]

    def of(self, z: Tensor, base: Tensor, perturbed: Tensor) -> Float64[Tensor, " s"]:
        logs = functional.log_softmax(perturbed, dim=2)
        return logs.gather(2, self.labels.expand(len(z), -1)[:, :, None]).mean((1, 2))


@dataclass(frozen=True)
class SquaredErrorScore:
    """Minus the squared error, mean over the reference batch and the outputs."""

    targets: Float64[Tensor, "n C"]

    def of(self, z: Tensor, base: Tensor, perturbed: Tensor) -> Float64[Tensor, " s"]:
        return -(perturbed - self.targets).square().mean((1, 2))


@dataclass(frozen=True)
class FunctionScore:
    """Anyone's function of (θ, θ_s, f(X;θ), f(X;θ_s)); that a draw's score depends on no other draw is trusted."""

    function: ScoreFunction
    name: str
    theta: Float64[Tensor, " P"]
    per_example: bool

    def of(self, z: Tensor, base: Tensor, perturbed: Tensor) -> Float64[Tensor, "s *n"]:
        try:
            result = self.function(self.theta, self.theta + z, base, perturbed)
        except NNTKError:
            raise
        except Exception as error:  # the function is anyone's; its exception stays visible as the cause
            if is_out_of_memory(error):
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise NNTKError(
                f"the score {self.name} failed on {len(z)} draws, parameters of shape {tuple(self.theta.shape)} and "
                f"outputs of shape {tuple(base.shape)}: {reason}"
            ) from error
        expected = (len(z), len(base)) if self.per_example else (len(z),)
        if not isinstance(result, Tensor) or tuple(result.shape) != expected or result.is_complex():
            came = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            axes = "draw and example" if self.per_example else "draw"
            raise NNTKError(
                f"the score {self.name} returned {came}, {len(z)} draws and {len(base)} examples were given; allowed: "
                f"a tensor of real numbers of shape {expected}, one for each {axes}"
            )
        return result.detach().to(base.device, torch.float64)


def make_score(
    weighting: Weighting, reference: Reference, theta: Tensor, base: Float64[Tensor, "n C"], seed: int
) -> Score:
    """The score that a weighting names; `base` is f(X;θ) on the reference batch.

    Raises: NNTKError where targets are missing or do not fit the outputs, outputs are 0, or a function is not there.
    """
    name = weighting.name
    if not isinstance(name, str):
        return FunctionScore(name, weighting.label, theta.double(), weighting.per_example)
    if name.startswith(PYTHON):
        function = import_function(name.removeprefix(PYTHON), what="weighting")
        return FunctionScore(function, name, theta.double(), weighting.per_example)
    if name == "parameter":
        return ParameterScore(theta.double(), key_of_query(theta, weighting.dimension, seed), weighting.dimension)
    if name == "output":
        mean_square = float(base.square().sum(1).mean())
        if mean_square == 0.0:
            raise NNTKError(
                "weighting is 'output', but all outputs are 0 on the reference batch, to which their changes are "
                "compared; give another reference, or a score of your own"
            )
        return OutputScore(mean_square, weighting.per_example)
    return _loss_score(reference.targets, base)


def _loss_score(targets: Tensor | None, base: Float64[Tensor, "n C"]) -> Score:
    """Labels or numbers, by the type of the targets."""
    if targets is None:
        raise NNTKError(
            "weighting is 'loss', which needs targets of the reference batch; give targets beside reference, one for "
            "each example"
        )
    count, outputs = base.shape
    came = f"weighting.targets are {targets.dtype} of shape {tuple(targets.shape)}"
    if targets.is_floating_point():
        values = targets.double().reshape(count, -1)
        if values.shape != base.shape or not bool(torch.isfinite(values).all()):
            raise NNTKError(f"{came}; allowed for numbers: finite ones of shape ({count}, {outputs}), as the outputs")
        return SquaredErrorScore(values)
    if targets.shape != (count,) or targets.is_complex() or targets.dtype == torch.bool:
        raise NNTKError(f"{came}; allowed: labels, whole numbers of shape ({count},), or numbers, floating point")
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= outputs:
        raise NNTKError(
            f"weighting.targets are labels from {low} to {high}, and the model has {outputs} outputs; allowed: 0 to "
            f"{outputs - 1} (as floating point numbers they are targets of a squared error)"
        )
    return CrossEntropyScore(targets.long())


def key_of_query(theta: Tensor, dimension: int, seed: int) -> Float64[Tensor, " P"]:
    """The vector w = KᵀQθ; Q and K are (d_k, P) with entries N(0, 1/P), made a slice of parameters at a time."""
    parameters = theta.double()
    count, rows = len(parameters), torch.arange(dimension, dtype=torch.int64, device=theta.device)
    query = torch.zeros(dimension, dtype=torch.float64, device=theta.device)
    for start, stop in _slices(count, dimension):
        query += normal(seed, Stream.ATTENTION, rows, start, stop, draw=QUERY_DRAW) @ parameters[start:stop]
    parts = [normal(seed, Stream.ATTENTION, rows, *part, draw=KEY_DRAW).T @ query for part in _slices(count, dimension)]
    return torch.cat(parts) / count


def _slices(count: int, dimension: int) -> Iterator[tuple[int, int]]:
    width = max(256, _SLICE_ELEMENTS // dimension)
    for start in range(0, count, width):
        yield start, min(start + width, count)
