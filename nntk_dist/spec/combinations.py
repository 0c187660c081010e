"""Which kernel options go together.

Each check raises an ArgumentError whose first word is the option to change.

Axes: P parameters; S draws in R blocks.
"""

from typing import TYPE_CHECKING

from nntk_dist.errors import ArgumentError
from nntk_dist.layers.sketches.projected_outputs import check_projections
from nntk_dist.layers.sketches.sketch import columns_of_sketch
from nntk_dist.sampling.designs import GROUP_SIZES, MINIMUM_BLOCKS, Design, blocks_message
from nntk_dist.sampling.laws import Gaussian, RadialLaw, radial_names
from nntk_dist.spec.choices import ContractionChoice, EstimatorChoice, GammaScale, Kind, Outputs, Statistic
from nntk_dist.statistics.required_draws import check_accuracy
from nntk_dist.weighting.options import check_weighting

if TYPE_CHECKING:
    from nntk_dist.spec.kernel_spec import KernelSpec

_DIFFERENCES = (EstimatorChoice.AUTO, EstimatorChoice.WEIGHT)
_GRADIENTS = (EstimatorChoice.AUTO, EstimatorChoice.AUTODIFF)


def check_combinations(spec: "KernelSpec") -> None:
    """Check every pair of options that can contradict each other.

    Raises:
        ArgumentError: two options do not go together.
    """
    _check_contraction(spec)
    check_accuracy(spec.rtol, spec.max_draws, kind=spec.kind, blocks=spec.blocks, draws=spec.draws)
    if spec.kind != Kind.LOCAL:
        _check_blocks(spec)
        _check_law(spec)
    _check_groups(spec)
    check_weighting(spec.weighting, kind=spec.kind, estimator=spec.estimator)
    _check_estimator(spec)


def _check_contraction(spec: "KernelSpec") -> None:
    """A contraction needs gradients; a sketch needs a kind that knows its error."""
    if spec.contraction != ContractionChoice.AUTO and (
        spec.kind == Kind.COVARIANCE or spec.estimator == EstimatorChoice.WEIGHT
    ):
        what = "kind covariance" if spec.kind == Kind.COVARIANCE else "estimator weight"
        raise ArgumentError(
            f"contraction is '{spec.contraction}'; allowed for {what}, which uses differences of outputs: auto"
        )
    sketches = spec.kind in (Kind.NONLOCAL, Kind.LOCAL)
    if spec.contraction == ContractionChoice.SKETCH and not sketches:
        raise ArgumentError(
            f"contraction is 'sketch'; allowed for kind {spec.kind}: auto, layered, means (only the kinds nonlocal and "
            "local know the error of a sketch)"
        )
    _check_projections(spec)
    if spec.sketch == "auto":
        return
    if spec.contraction not in (ContractionChoice.AUTO, ContractionChoice.SKETCH) or not sketches:
        what = f"contraction {spec.contraction}" if sketches else f"kind {spec.kind}"
        raise ArgumentError(f"sketch is {spec.sketch}; allowed for {what}, which sketches nothing: auto")
    columns_of_sketch(spec.sketch)


def _check_projections(spec: "KernelSpec") -> None:
    """Only a sketch of gradients projects outputs, and only if they are summed."""
    asked, what = spec.output_projections, ""
    if isinstance(asked, str) or asked == 0:
        return
    if spec.outputs != Outputs.TRACE:
        what = f"outputs {spec.outputs}"
    elif spec.contraction not in (ContractionChoice.AUTO, ContractionChoice.SKETCH):
        what = f"contraction {spec.contraction}"
    elif not spec.may_sketch or spec.estimator not in _GRADIENTS:
        what = f"kind {spec.kind} and estimator {spec.estimator} without a sketch of gradients"
    if what:
        raise ArgumentError(f"output_projections is {asked}; allowed for {what}: auto, 0")
    check_projections(asked, spec.sketch, 1 if spec.kind == Kind.LOCAL else spec.blocks)


def _check_groups(spec: "KernelSpec") -> None:
    """Kernels of groups need a kernel that is a sum over parameters; a search for draws has one kernel."""
    if spec.group is not None and spec.group not in spec.group_names:
        allowed = ", ".join(spec.group_names) or "none (parameters is a list)"
        raise ArgumentError(f"group is '{spec.group}'; allowed for these parameters: {allowed}")
    if spec.group_names and spec.kind == Kind.COVARIANCE:
        raise ArgumentError(
            "parameters is a mapping of groups; allowed for kind covariance, which is no sum over parameters: a list "
            "of name patterns"
        )
    if spec.group_names and spec.rtol is not None:
        raise ArgumentError(
            f"rtol is {spec.rtol:g}; allowed for parameters in groups, which share their draws: none (set draws)"
        )


def _check_blocks(spec: "KernelSpec") -> None:
    if spec.blocks < MINIMUM_BLOCKS and spec.design != Design.ORTHOGONAL:
        raise ArgumentError(blocks_message(spec.blocks))
    if spec.blocks == 1 and spec.kind == Kind.NONLOCAL and spec.statistic != Statistic.PLUGIN:
        raise ArgumentError(
            f"statistic is '{spec.statistic}'; allowed for blocks 1: plugin (the unbiased one pairs different blocks)"
        )
    if isinstance(spec.draws, str):
        return
    unit = spec.blocks * GROUP_SIZES[spec.design]
    if spec.draws % unit:
        lower = spec.draws - spec.draws % unit
        nearest = f"{lower} or {lower + unit}" if lower else f"{unit}"
        raise ArgumentError(
            f"draws is {spec.draws}, which does not fill {spec.blocks} blocks (design {spec.design}); "
            f"allowed: auto, or a multiple of {unit}, the nearest: {nearest}"
        )


def _check_law(spec: "KernelSpec") -> None:
    name = spec.distribution.name
    if spec.kind == Kind.COVARIANCE and spec.gamma_scale == GammaScale.RELATIVE:
        raise ArgumentError(
            "gamma_scale is 'relative'; allowed for kind covariance: absolute (scaled by tensor, it would tend to "
            "another kernel than the NTK)"
        )
    if spec.estimator == EstimatorChoice.ACTIVATION:
        _check_activation(spec)
    if isinstance(spec.distribution, RadialLaw):
        return
    if spec.kind != Kind.NONLOCAL:
        raise ArgumentError(
            f"distribution is '{name}', which is not radial; allowed for kind {spec.kind}: {', '.join(radial_names())}"
        )
    if spec.estimator not in _DIFFERENCES:
        raise ArgumentError(
            f"estimator is '{spec.estimator}'; allowed for distribution {name}, which is not radial: auto, weight"
        )
    if spec.design == Design.ORTHOGONAL:
        raise ArgumentError(f"design is 'orthogonal'; allowed for distribution {name}: iid, antithetic")


def _check_activation(spec: "KernelSpec") -> None:
    if not isinstance(spec.distribution, Gaussian):
        raise ArgumentError(
            "estimator is 'activation', which adds Gaussian noise to layers; allowed for distribution "
            f"{spec.distribution.name}: auto, weight, autodiff"
        )
    if spec.design == Design.ORTHOGONAL:
        raise ArgumentError(
            "design is 'orthogonal'; allowed for estimator activation, which draws noise for each example: iid, "
            "antithetic"
        )


def _check_estimator(spec: "KernelSpec") -> None:
    if spec.kind == Kind.COVARIANCE and spec.estimator not in _DIFFERENCES:
        raise ArgumentError(
            f"estimator is '{spec.estimator}'; allowed for kind covariance, which uses differences of outputs: "
            "auto, weight"
        )
    if spec.kind in (Kind.AVERAGED, Kind.LOCAL) and spec.estimator not in _GRADIENTS:
        raise ArgumentError(
            f"estimator is '{spec.estimator}'; allowed for kind {spec.kind}, which uses gradients: auto, autodiff"
        )
