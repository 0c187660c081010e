"""Kernels of a model on tensors in memory: `nonlocal_kernel`, `covariance_kernel`, `averaged_kernel`, `local_kernel`.

The same features, sums and statistics as the pipeline's, in one process and without a store. Features of all rows are
held: for what does not fit, use the pipeline.

Axes: n1, n2 examples, c outputs; `full` kernels are indexed i·C + c.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nntk_dist.errors import NNTKError, NNTKWarning
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.planning.decision import Decision, decide
from nntk_dist.planning.draw_search import find_draws
from nntk_dist.planning.feature_maps import make_feature_map
from nntk_dist.planning.model_probes import ModelProbes
from nntk_dist.products.features import FeatureMap, Rows, slice_rows
from nntk_dist.products.wanted import Wanted
from nntk_dist.runtime.precision import full_precision
from nntk_dist.sampling.designs import MINIMUM_BLOCKS
from nntk_dist.spec import KernelSpec
from nntk_dist.statistics.estimates import (
    Calibration,
    Estimates,
    relative_distance,
    sample_entries,
    sample_limit,
    t_quantile,
)
from nntk_dist.statistics.required_draws import verdict
from nntk_dist.statistics.tile_estimates import calibrate_sample, tile_estimates
from nntk_dist.weighting.options import Weighting, as_weighting
from nntk_dist.weighting.scores.base import ScoreFunction

_TILE_ROWS = 1024
_LOCAL_TILES, _LEAST_LOCAL_ROWS = 4, 128  # tiles a side: ten of the sixteen of a symmetric kernel are made
_BATCH = 256


@dataclass(frozen=True)
class KernelEstimate:
    """A kernel with its standard error.

    `kernel` is the asked statistic ("both" gives plugin), `plugin` and `unbiased` the two of a nonlocal kernel (None
    elsewhere);
    `stderr` is that of `unbiased` (of the kernel itself for the other kinds), NaN where no draw changed the output.
    `relative_error` estimates ‖U − Θ‖/‖Θ‖, which lies below `relative_error_bound` in 95 % of all cases; both are NaN
    where fewer than four blocks give no error bars (`stderr` None). `reached` says whether the bound is below an asked
    `rtol` (None where none was); `relative_bias` is ‖plugin − unbiased‖/‖unbiased‖. `probes` is what the model was
    found to be like; what they say is not to be trusted is warned of too, by an `NNTKWarning`.
    """

    kernel: Tensor
    stderr: Tensor | None
    plugin: Tensor | None
    unbiased: Tensor | None
    estimator: str
    reason: str
    draws: int
    blocks: int
    num_parameters: int
    relative_error: float
    relative_bias: float | None
    relative_error_bound: float = math.nan
    reached: bool | None = None
    probes: ModelProbes | None = None

    def interval(self, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
        """Two-sided intervals by Student's t with R − 1 degrees of freedom, around the unbiased estimate."""
        if self.stderr is None:
            raise NNTKError(
                "this kernel has no standard error: it is exact (kind local), or made of fewer than "
                f"{MINIMUM_BLOCKS} blocks"
            )
        centre = self.kernel if self.unbiased is None else self.unbiased
        reach = t_quantile(confidence, self.blocks) * self.stderr
        return centre - reach, centre + reach


def nonlocal_kernel(
    model: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    gamma: float,
    distribution: Any = "gaussian",
    gamma_scale: str = "absolute",
    estimator: str = "auto",
    statistic: str = "unbiased",
    design: str = "iid",
    draws: int | str = "auto",
    blocks: int = 8,
    rtol: float | None = None,
    max_draws: int = 65536,
    outputs: str | int = "trace",
    scale: str = "localized",
    weighting: str | Mapping[str, Any] | Weighting | ScoreFunction | None = None,
    contraction: str = "auto",
    sketch: int | str = "auto",
    parameters: Sequence[str] = ("*",),
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    batch: int | None = None,
) -> KernelEstimate:
    """The nonlocal NTK Θ(x,x')[c,c'] = ⟨g_c(x), g_c'(x')⟩, g = P·E[(f(x;θ+z) − f(x;θ)) z/|z|²], z of range γ.

    Assumes that an example's output does not depend on its batch; eval mode is used. A model with noise
    (`StochasticModule`) is taken in expectation: every group of draws has noise of its own, shared by all examples and
    by both evaluations of a draw.
    `unbiased` is right on average and not PSD, `plugin` is PSD and inflated by noise: solve with `plugin`, compare
    entries with `unbiased`.
    `contraction` says how products of gradients are made, layer by layer: from `layered` factors, block `means`, or a
    `sketch` of k numbers a block (of each output where outputs is full or the estimator `activation`), whose own error,
    √(2/k) to √(6/k) of an entry of the diagonal, stderr counts; auto is exact wherever that can be afforded, and
    `reason` says.
    `weighting` (`weight` alone) lets draws count by the softmax of a score, ĝ = P Σ_s α_s Δ_s z_s/|z_s|²: parameter,
    output, loss, a function, or a mapping of name, temperature, per_example, dimension, reference and targets
    (`nntk_dist.weighting.options.Weighting`). The kernel is then that of the ratio E[w Δ v]/E[w], w = exp(score/τ), for
    which it is consistent in the draws of a block, with a bias of order blocks/draws, and neither statistic is
    unbiased.
    With `rtol`, draws are added (from `draws`, up to `max_draws`) until ‖U − Θ‖/‖Θ‖ is below it by a 95 % bound, found
    on at most 32 + 32 rows, more where one side has few (`nntk_dist.statistics.required_draws`); `reached` says whether
    it is, and a warning where not. Cost: `weight` S forward passes and O(S·C) multiply-adds an entry; `autodiff` S·(1 +
    2C) pass equivalents and S² products of the layers' widths an entry; `activation` (gaussian alone; jumps too) S
    forward passes with noise and the same products, for all outputs at once. Source: arXiv 2509.12467; estimators and
    error bars are this library's.

    Raises: NNTKError for arguments out of range, a model that is not finite, or an estimator that is not valid for the
    model.
    """
    spec = KernelSpec(
        kind="nonlocal",
        gamma=gamma,
        distribution=distribution,
        gamma_scale=gamma_scale,
        estimator=estimator,
        statistic=statistic,
        design=design,
        draws=draws,
        blocks=blocks,
        parameters=parameters,
        outputs=outputs,
        scale=scale,
        seed=seed,
        contraction=contraction,
        sketch=sketch,
        rtol=rtol,
        max_draws=max_draws,
        weighting=as_weighting(weighting),
    )
    return _compute(model, x1, x2, spec, device, dtype, batch)


def covariance_kernel(
    model: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    gamma: float,
    distribution: Any = "gaussian",
    gamma_scale: str = "absolute",
    design: str = "iid",
    draws: int | str = "auto",
    blocks: int = 8,
    rtol: float | None = None,
    max_draws: int = 65536,
    outputs: str | int = "trace",
    scale: str = "localized",
    parameters: Sequence[str] = ("*",),
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    batch: int | None = None,
) -> KernelEstimate:
    """C(x,x') = P·E[Δ(x)Δ(x')/|z|²]: PSD, unbiased, error ~ 1/√S whatever P; tends to the NTK as γ → 0 but is not the
    NNTK.

    Antithetic draws average the products at +z and at −z. Raises as `nonlocal_kernel`.
    """
    spec = KernelSpec(
        kind="covariance",
        gamma=gamma,
        distribution=distribution,
        gamma_scale=gamma_scale,
        estimator="auto",
        statistic="plugin",
        design=design,
        draws=draws,
        blocks=blocks,
        parameters=parameters,
        outputs=outputs,
        scale=scale,
        seed=seed,
        rtol=rtol,
        max_draws=max_draws,
    )
    return _compute(model, x1, x2, spec, device, dtype, batch)


def averaged_kernel(
    model: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    gamma: float,
    distribution: Any = "gaussian",
    gamma_scale: str = "absolute",
    design: str = "iid",
    draws: int | str = "auto",
    blocks: int = 8,
    rtol: float | None = None,
    max_draws: int = 65536,
    outputs: str | int = "trace",
    scale: str = "localized",
    parameters: Sequence[str] = ("*",),
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    batch: int | None = None,
) -> KernelEstimate:
    """E_z[NTK(θ + U^{1/P} z)]: PSD, unbiased, the NTK averaged over the neighbourhood. Raises as `nonlocal_kernel`."""
    spec = KernelSpec(
        kind="averaged",
        gamma=gamma,
        distribution=distribution,
        gamma_scale=gamma_scale,
        estimator="auto",
        statistic="plugin",
        design=design,
        draws=draws,
        blocks=blocks,
        parameters=parameters,
        outputs=outputs,
        scale=scale,
        seed=seed,
        rtol=rtol,
        max_draws=max_draws,
    )
    return _compute(model, x1, x2, spec, device, dtype, batch)


def local_kernel(
    model: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    outputs: str | int = "trace",
    parameters: Sequence[str] = ("*",),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    batch: int | None = None,
) -> Tensor:
    """The empirical NTK ⟨∇f_c(x), ∇f_c'(x')⟩ by automatic differentiation, exact to rounding; layer by layer.

    Raises: NNTKError where per-example gradients cannot be had.
    """
    spec = KernelSpec(kind="local", statistic="plugin", outputs=outputs, parameters=parameters)
    return _compute(model, x1, x2, spec, device, dtype, batch).kernel


@full_precision()
def _compute(
    model: nn.Module,
    x1: Tensor,
    x2: Tensor | None,
    spec: KernelSpec,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    batch: int | None,
) -> KernelEstimate:
    first = next(model.parameters(), None)
    dtype = dtype or (torch.float32 if first is None else first.dtype)
    device = device or ("cpu" if first is None else first.device)
    prepared = prepare_model(model, dtype=dtype, device=device)
    inputs = [_check_inputs(x, name) for x, name in ((x1, "x1"), (x2, "x2")) if x is not None]
    # copies, since a model may write to its input
    inputs = [x.to(device, dtype if x.is_floating_point() else x.dtype, copy=True) for x in inputs]
    batch = min(batch or _BATCH, max(len(x) for x in inputs))
    decision = decide(prepared, max(inputs, key=len), spec, batch=batch)  # the more rows, the more is seen
    for caution in () if decision.probes is None else decision.probes.cautions:
        warnings.warn(caution, NNTKWarning, stacklevel=4)  # where the public function was called
    ids = torch.arange(sum(map(len, inputs)), device=device).split([len(x) for x in inputs])
    look = None
    if spec.rtol is not None:
        decision, look = find_draws(prepared, inputs, ids, spec, decision, batch=batch)
        if not look.reaches(spec.rtol):
            warnings.warn(verdict(look, rtol=spec.rtol, max_draws=spec.max_draws), NNTKWarning, stacklevel=4)
    features = make_feature_map(prepared, inputs[0], spec, decision)
    everything = range(features.num_draws)
    rows = [
        features.compute(x, names, everything, features.columns, batch=batch)
        for x, names in zip(inputs, ids, strict=True)
    ]
    estimates, calibration = whole_kernel(features, rows[0], rows[1] if len(rows) == 2 else None, spec)
    result = _result(estimates, calibration, features, spec, decision, dtype)
    if look is None or spec.rtol is None:
        return result
    # what the pilot knows of the error, from more blocks than the kernel has
    return replace(
        result,
        relative_error=look.relative_error,
        relative_error_bound=look.bound,
        reached=look.reaches(spec.rtol),
    )


def _check_inputs(x: object, name: str) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim < 1 or len(x) == 0:
        came = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise NNTKError(f"{name} is {came}; allowed: a tensor with one example or more along its first axis")
    return x


def whole_kernel(
    features: FeatureMap, rows: Rows, others: Rows | None, spec: KernelSpec
) -> tuple[Estimates, Calibration | None]:
    """The whole kernel from features of all rows, tile by tile; the upper triangle and its mirror image where both row
    sets are one.
    """
    symmetric, right = others is None, rows if others is None else others
    n1, n2 = len(next(iter(rows.values()))), len(next(iter(right.values())))
    width = len(features.columns) if spec.meeting.full else 1
    calibration = None
    if features.num_blocks >= MINIMUM_BLOCKS:
        sample, other_sample = sample_entries(spec.seed, n1, n2, sample_limit(width))
        sampled = slice_rows(rows, sample), slice_rows(right, other_sample)
        calibration = calibrate_sample(features, [sampled], spec.meeting)
    edge = _TILE_ROWS
    if symmetric and spec.kind == "local":
        edge = min(edge, max(_LEAST_LOCAL_ROWS, -(-n1 // _LOCAL_TILES)))
    parts: dict[str, Tensor] = {}
    for j in range(0, n2, edge):
        right_tile = features.prepare(slice_rows(right, slice(j, j + edge)), Wanted(stderr=calibration is not None))
        for i in range(0, j + 1 if symmetric else n1, edge):
            left_tile = right_tile if symmetric and i == j else slice_rows(rows, slice(i, i + edge))
            tile = tile_estimates(features, [(left_tile, right_tile)], spec.meeting, calibration, spec.scale)
            for name, values in tile.items():
                whole = parts.setdefault(name, values.new_empty(n1 * width, n2 * width))
                _place(whole, values, i * width, j * width)
                if symmetric and i != j:
                    _place(whole, values.T, j * width, i * width)
    return Estimates(parts["plugin"], parts.get("unbiased"), parts.get("stderr")), calibration


def _place(whole: Tensor, values: Tensor, row: int, column: int) -> None:
    whole[row : row + values.shape[0], column : column + values.shape[1]] = values


def _result(
    estimates: Estimates,
    calibration: Calibration | None,
    features: FeatureMap,
    spec: KernelSpec,
    decision: Decision,
    dtype: torch.dtype,
) -> KernelEstimate:
    plugin, unbiased = estimates.plugin, estimates.unbiased
    kernel = unbiased if spec.statistic == "unbiased" and unbiased is not None else plugin

    unknown = 0.0 if spec.kind == "local" else math.nan

    def cast(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.to(dtype)

    return KernelEstimate(
        kernel=kernel.to(dtype),
        stderr=cast(estimates.stderr),
        plugin=cast(plugin) if features.pair_blocks else None,
        unbiased=cast(unbiased),
        estimator=decision.estimator,
        reason=decision.explanation,
        draws=features.num_draws,
        blocks=features.num_blocks,
        num_parameters=features.num_parameters,
        relative_error=unknown if calibration is None else calibration.relative_error,
        relative_error_bound=unknown if calibration is None else calibration.bound,
        relative_bias=None if unbiased is None else relative_distance(plugin, unbiased),
        probes=decision.probes,
    )
