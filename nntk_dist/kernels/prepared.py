"""The kernel of a model, prepared once: what is decided on some examples is kept for all later ones.

Axes: n1, n2 examples; C outputs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nntk_dist.errors import ArgumentError, ModelError, first_line
from nntk_dist.kernels.estimate import KernelEstimate
from nntk_dist.kernels.tiles import ComputedRows, HeldRows, RowSets, feature_limit, output_portions, whole_kernel
from nntk_dist.models.calling import Calling
from nntk_dist.models.evaluation import FAILS_ON_INPUTS, prepare_model, trying
from nntk_dist.models.output import as_output
from nntk_dist.models.structured import Layout, is_structured
from nntk_dist.planning.decision import Decision, decide
from nntk_dist.planning.draw_search import find_draws
from nntk_dist.planning.feature_maps import make_feature_map
from nntk_dist.planning.pilot import with_automatic_draws
from nntk_dist.products.features import FeatureMap, Rows
from nntk_dist.registration.callables import check_integer
from nntk_dist.runtime.arrays import as_examples, magnitude_caution
from nntk_dist.runtime.precision import full_precision
from nntk_dist.runtime.warning import warn_caller
from nntk_dist.spec import KernelSpec, Kind, Statistic, useless_estimate
from nntk_dist.statistics.overflow import check_no_overflow
from nntk_dist.statistics.required_draws import Look, verdict
from nntk_dist.statistics.standard_errors import Calibration, Estimates, relative_distance

Array = Tensor | np.ndarray
Examples = Array | Mapping[str, Array] | Sequence[Array]
BATCH = 256
_ONE_TENSOR = Calling()
_HALVES = {"bfloat16", "float16"}


@dataclass(frozen=True)
class Placement:
    """How a model is evaluated: device, dtype, rows in one forward pass, and how it is called."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    calling: Calling = _ONE_TENSOR

    @classmethod
    def of(
        cls,
        model: nn.Module,
        examples: Examples,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        batch: int | None = None,
        output: Any = None,
    ) -> "Placement":
        """Return the placement for examples like these.

        Args:
            model: the model.
            examples: a tensor or NumPy array, or a dict or tuple of them with one leading axis.
            device: by default the model's first parameter's.
            dtype: by default the model's first parameter's; float32 if that has half precision.
            batch: rows in one forward pass, 256 by default.
            output: what of the model's result is f (`nntk_dist.models.output`).

        Raises:
            ArgumentError: the model is no module, the output does not fit the examples, or device, dtype or batch is
                not allowed.
            ModelError: the model's parameters have no values.
        """
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"model is a {type(model).__name__}; allowed: a torch.nn.Module, or a BlackBox")
        _check_places(device, dtype, batch)
        first = next((p for p in model.parameters() if p.is_floating_point() or p.is_complex()), None)
        if first is not None and first.is_meta:
            raise ModelError("the model's parameters are on the device meta, without values; load or initialise them")
        own = torch.float32 if first is None else first.dtype.to_real()
        dtype = dtype or (torch.float32 if own.itemsize < torch.float32.itemsize else own)
        layout = Layout.of(examples, "x1", dtype) if is_structured(examples) else None
        calling = Calling.choose(model, layout, as_output(output))
        device = device or ("cpu" if first is None else first.device)
        return cls(torch.device(device), dtype, batch or BATCH, calling)

    def take(self, examples: Examples, name: str) -> Tensor:
        """Return a copy of the examples on the device, numbers in the dtype: a model may write to its input.

        Examples of several parts are packed into bytes (`nntk_dist.models.structured`).

        Raises:
            ArgumentError: there are no examples, or they have other parts than the first ones, or are no arrays.
        """
        layout = self.calling.layout
        if (layout is not None) != is_structured(examples):
            allowed = "a tensor or NumPy array" if layout is None else f"the parts {layout}"
            raise ArgumentError(f"{name} is a {type(examples).__name__}; allowed: {allowed}, as the first examples")
        if layout is not None:
            return layout.pack(examples, name).to(self.device)
        x = as_examples(examples, name)
        return x.to(self.device, self.dtype if x.is_floating_point() else x.dtype, copy=True)

    def reason(self, model: nn.Module) -> str:
        """Say what a reader of the numbers should know of dtype and output; empty if there is nothing."""
        notes = []
        halves = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()} & _HALVES
        if halves and self.dtype.itemsize >= torch.float32.itemsize:
            kept = str(self.dtype).removeprefix("torch.")
            notes.append(f"; computed in {kept}, to which {' and '.join(sorted(halves))} parameters were converted")
        if self.calling.output.text:
            notes.append(f"; f is the output: {self.calling.output.text}")
        return "".join(notes)

    def batch_for(self, *inputs: Tensor) -> int:
        """Return the rows in one forward pass over these inputs."""
        return min(self.batch, max(map(len, inputs)))


@dataclass(frozen=True, eq=False, repr=False)
class PreparedKernel:
    """A function of (x1, x2) that keeps the decision about a model: a call plans and probes nothing.

    Attributes:
        spec: the kernel.
        decision: which estimator, why, and how it is computed.
        features: the features of examples under all draws, on a private copy of the model.
        placement: device, dtype and batch.
        example_shape: the shape of one example.
        accuracy: how the search for `rtol` ended, if there was one.
    """

    spec: KernelSpec
    decision: Decision
    features: FeatureMap
    placement: Placement
    example_shape: tuple[int, ...]
    accuracy: Look | None

    def __call__(self, x1: Examples, x2: Examples | None = None) -> KernelEstimate[Tensor]:
        """Compute the kernel between the examples of x1 and x2, or of x1 with itself.

        Raises:
            ArgumentError: the examples have another shape than those that the kernel was prepared for.
            NNTKError: the model's output or gradient is not finite.
        """
        return self.estimate(self.taken(x1, x2))

    def taken(self, x1: Examples, x2: Examples | None) -> list[Tensor]:
        """Return copies of the examples on the device, as `Placement.take`.

        Raises:
            ArgumentError: the examples have another shape than those that the kernel was prepared for.
        """
        named = [("x1", x1)] if x2 is None else [("x1", x1), ("x2", x2)]
        inputs = [self.placement.take(examples, name) for name, examples in named]
        for (name, _), x in zip(named, inputs, strict=True):
            if tuple(x.shape[1:]) != self.example_shape:
                raise ArgumentError(
                    f"{name} has examples of shape {tuple(x.shape[1:])}; allowed: {self.example_shape}, as prepared"
                )
        return inputs

    def __repr__(self) -> str:
        return f"PreparedKernel({self.spec.kind}, {self.decision.estimator}, {self.features.num_draws} draws)"

    @torch.inference_mode(False)  # the caller's would forbid gradients
    @full_precision()
    def estimate(self, inputs: list[Tensor]) -> KernelEstimate[Tensor]:
        """Compute the kernel of inputs that the placement has taken: x1, or x1 and x2."""
        return self.estimate_of(self._source(inputs))

    def estimate_of(self, source: RowSets) -> KernelEstimate[Tensor]:
        """Compute the kernel from features of its rows and columns."""
        estimates, calibration = whole_kernel(self.features, source, self.spec)
        return self._result(estimates, calibration, symmetric=source.symmetric)

    def _source(self, inputs: list[Tensor]) -> RowSets:
        """Compute the features of all rows, or defer it to the tiles if they do not fit into memory."""
        batch, ids = self.placement.batch_for(*inputs), example_ids(inputs)
        portions = output_portions(
            self.features,
            sum(map(len, inputs)),
            self.placement.dtype.itemsize,
            full=self.spec.meeting.full,
            limit=feature_limit(self.placement.device),
        )
        if portions is None:
            parts = [self.rows(x, names, batch) for x, names in zip(inputs, ids, strict=True)]
            return HeldRows(self.features, parts[0], parts[1] if len(parts) == 2 else None)
        return ComputedRows(partial(self._some_outputs, batch), [*zip(inputs, ids, strict=True)], portions)

    def _some_outputs(self, batch: int, x: Tensor, ids: Tensor, columns: tuple[int, ...]) -> Rows:
        features, batch = self.features, min(batch, len(x))
        with trying(ModelError, FAILS_ON_INPUTS):
            return features.compute(x, ids, range(features.num_draws), columns, batch=batch)

    def rows(self, x: Tensor, ids: Tensor, batch: int) -> Rows:
        """Compute the features of examples, which `ids` number, under all draws."""
        return self._some_outputs(batch, x, ids, self.features.columns)

    def _result(
        self, estimates: Estimates, calibration: Calibration | None, *, symmetric: bool
    ) -> KernelEstimate[Tensor]:
        plugin, unbiased, dtype = estimates.plugin, estimates.unbiased, self.placement.dtype
        chosen = unbiased if self.spec.statistic == Statistic.UNBIASED and unbiased is not None else plugin
        error = bound = 0.0 if self.spec.kind == Kind.LOCAL else math.nan
        if calibration is not None:
            error, bound = calibration.relative_error, calibration.bound
        reached = None
        if self.accuracy is not None and self.spec.rtol is not None:
            # the search knows the error better, from more blocks than the kernel has
            error, bound = self.accuracy.relative_error, self.accuracy.bound
            reached = self.accuracy.reaches(self.spec.rtol)
        elif calibration is not None and (caution := useless_estimate(self.spec, error, self.features.num_draws)):
            warn_caller(caution)

        def cast(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.to(dtype)

        kernel = chosen.to(dtype)
        width = len(self.features.columns) if self.spec.meeting.full else 1
        check_no_overflow(kernel, ("x1", 0), ("x1" if symmetric else "x2", 0), width)
        return KernelEstimate(
            kernel=kernel,
            stderr=cast(estimates.stderr),
            plugin=cast(plugin) if self.features.pair_blocks else None,
            unbiased=cast(unbiased),
            estimator=self.decision.estimator,
            reason=self.decision.explanation,
            draws=self.features.num_draws,
            blocks=self.features.num_blocks,
            num_parameters=self.features.num_parameters,
            relative_error=error,
            relative_bias=None if unbiased is None else relative_distance(plugin, unbiased),
            relative_error_bound=bound,
            reached=reached,
            unresolved_share=0.0 if estimates.stderr is None else float(estimates.stderr.isnan().double().mean()),
            probes=self.decision.probes,
            variance_reduced=self.decision.plan.variance_reduced,
        )


@torch.inference_mode(False)  # the caller's would forbid gradients
@full_precision()
def prepare(model: nn.Module, inputs: list[Tensor], spec: KernelSpec, placement: Placement) -> PreparedKernel:
    """Decide how the kernel of a model is computed.

    Args:
        model: the model; a private copy of it is evaluated.
        inputs: the examples to decide on, which the placement has taken: x1, or x1 and x2.
        spec: the kernel; its parameters are in no groups.
        placement: device, dtype and batch.

    Raises:
        NNTKError: no kernel of this description can be computed for the model.
    """
    private, decision, accuracy = decided(model, inputs, spec, placement)
    features = make_feature_map(private, inputs[0], spec, decision)
    return PreparedKernel(spec, decision, features, placement, tuple(inputs[0].shape[1:]), accuracy)


def decided(
    model: nn.Module, inputs: list[Tensor], spec: KernelSpec, placement: Placement
) -> tuple[nn.Module, Decision, Look | None]:
    """Return the private copy of a model, the decision, and how the search for `rtol` ended; see `prepare`."""
    private = prepare_model(model, dtype=placement.dtype, device=placement.device, calling=placement.calling)
    batch = placement.batch_for(*inputs)
    decision = decide(private, max(inputs, key=len), spec, batch=batch)  # more rows show more of the model
    decision = with_automatic_draws(private, max(inputs, key=len), spec, decision, batch=batch)
    decision = replace(decision, reason=decision.reason + placement.reason(model))
    cautions = () if decision.probes is None else decision.probes.cautions
    for caution in (*cautions, *filter(None, (magnitude_caution(x, "the examples") for x in inputs))):
        warn_caller(caution)
    accuracy = None
    if spec.rtol is not None:
        decision, accuracy = find_draws(private, inputs, example_ids(inputs), spec, decision, batch=batch)
        if not accuracy.reaches(spec.rtol):
            warn_caller(verdict(accuracy, rtol=spec.rtol, max_draws=spec.max_draws))
    return private, decision, accuracy


def _check_places(device: Any, dtype: Any, batch: Any) -> None:
    """Check the arguments that place a computation, before torch does."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ArgumentError(f"dtype is {dtype!r}; allowed: a floating-point dtype, such as torch.float64")
    if batch is not None:
        check_integer("batch", batch, 1)
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, TypeError) as error:
            raise ArgumentError(
                f"device is {str(device)!r}, which cannot be used here ({first_line(error)}); allowed: cpu, or one "
                "that torch sees, such as cuda:0"
            ) from error


def example_ids(inputs: list[Tensor]) -> list[Tensor]:
    """Number the examples of all inputs one after the other; the noise of an example is a function of its number."""
    total = sum(map(len, inputs))
    return list(torch.arange(total, device=inputs[0].device).split([len(x) for x in inputs]))


def check_same_kind(inputs: list[Tensor]) -> None:
    """Check that the examples of x2 have the shape and the dtype of those of x1.

    Raises:
        ArgumentError: they differ.
    """
    kinds = [f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape[1:])}" for x in inputs]
    if kinds[0] != kinds[-1]:
        raise ArgumentError(f"x2 has examples of {kinds[-1]}; allowed: {kinds[0]}, as x1")
