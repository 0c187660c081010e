"""Kernels with error bars against their definitions, given the draws: every estimator, design and way to treat outputs.

Axes: S draws, R blocks, n (n1, n2) examples, C outputs.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nntk_dist import KernelEstimate, averaged_kernel, covariance_kernel, local_kernel, nonlocal_kernel
from nntk_dist.spec import KernelSpec
from tests.harness.grids import pairwise
from tests.harness.tools import Definition, assert_equal, by_definition
from tests.oracles.cases import CASES, Case, case

FUNCTIONS = {"nonlocal": nonlocal_kernel, "covariance": covariance_kernel, "averaged": averaged_kernel}
LIPSCHITZ = [entry.name for entry in CASES if entry.lipschitz]
JUMPS = [entry.name for entry in CASES if not entry.lipschitz]


def estimate(model: nn.Module, x1: Tensor, x2: Tensor | None, spec: KernelSpec, **options) -> KernelEstimate:
    """Call the public function that the spec describes."""
    arguments = {
        "distribution": spec.distribution, "design": spec.design, "draws": spec.draws, "blocks": spec.blocks,
        "seed": spec.seed, "outputs": spec.outputs, "scale": spec.scale, "parameters": spec.parameters,
    }  # fmt: skip
    if spec.kind == "nonlocal":
        arguments |= {"estimator": spec.estimator, "statistic": spec.statistic}
    return FUNCTIONS[spec.kind](model, x1, x2, **arguments, **options)


def assert_is(ours: KernelEstimate, expected: Definition, relative: float = 1e-10) -> None:
    if expected.unbiased is None:
        assert ours.plugin is None
        assert ours.unbiased is None
        assert_equal(ours.kernel, expected.plugin, relative)
    else:
        assert_equal(ours.plugin, expected.plugin, relative)
        assert_equal(ours.unbiased, expected.unbiased, relative)
    assert_equal(ours.stderr, expected.stderr, relative, scale=float(np.abs(expected.plugin).max()))


def assert_estimate_is_its_definition(entry: Case, spec: KernelSpec, estimator: str) -> None:
    x1, x2 = entry.inputs(3), entry.inputs(2, seed=5)
    symmetric = estimate(entry.build(), x1, None, spec)
    assert symmetric.estimator == estimator
    assert_is(symmetric, by_definition(entry.build(), x1, x1, spec, estimator))
    assert_is(estimate(entry.build(), x1, x2, spec), by_definition(entry.build(), x1, x2, spec, estimator))


@pytest.mark.parametrize(
    ("draws", "outputs", "estimator"),
    pairwise(
        [("iid", 4), ("iid", 12), ("antithetic", 8), ("antithetic", 16)],
        ["trace", "full", 1],
        ["weight", "autodiff"],
    ),
)
def test_nonlocal_kernel(estimator: str, draws: tuple[str, int], outputs: str | int):
    design, num_draws = draws
    spec = KernelSpec(gamma=0.7, estimator=estimator, design=design, draws=num_draws, blocks=4, outputs=outputs, seed=3)
    assert_estimate_is_its_definition(case("relu_mlp"), spec, estimator)


@pytest.mark.parametrize("estimator", ["weight", "autodiff"])
@pytest.mark.parametrize("blocks", [5, 6])
def test_numbers_of_blocks(estimator: str, blocks: int):
    spec = KernelSpec(gamma=0.7, estimator=estimator, draws=2 * blocks, blocks=blocks, outputs="full")
    assert_estimate_is_its_definition(case("tanh_mlp"), spec, estimator)


@pytest.mark.parametrize(
    ("outputs", "design", "kernel"),
    pairwise(["trace", "full", 1], ["iid", "antithetic"], [("covariance", "weight"), ("averaged", "autodiff")]),
)
def test_other_kernels(outputs: str | int, design: str, kernel: tuple[str, str]):
    kind, estimator = kernel
    spec = KernelSpec(kind=kind, gamma=0.7, design=design, draws=20, blocks=5, outputs=outputs, statistic="plugin")
    assert_estimate_is_its_definition(case("relu_mlp"), spec, estimator)


@pytest.mark.parametrize("name", LIPSCHITZ)
def test_every_smooth_case_by_automatic_differentiation(name: str):
    spec = KernelSpec(gamma=0.3, estimator="autodiff", draws=8, blocks=4, outputs="full")
    entry, x1, x2 = case(name), case(name).inputs(3), case(name).inputs(2, seed=5)
    assert_is(estimate(entry.build(), x1, x2, spec), by_definition(entry.build(), x1, x2, spec, "autodiff"))
    averaged = KernelSpec(kind="averaged", gamma=0.3, draws=4, blocks=4, outputs="full", statistic="plugin")
    assert_is(estimate(entry.build(), x2, None, averaged), by_definition(entry.build(), x2, x2, averaged, "autodiff"))


@pytest.mark.parametrize("name", [entry.name for entry in CASES])
def test_every_case_by_differences(name: str):
    spec = KernelSpec(gamma=1.5, estimator="weight", draws=16, blocks=4)
    assert_estimate_is_its_definition(case(name), spec, "weight")


@pytest.mark.parametrize(
    ("estimator", "patterns"),
    [
        ("weight", ("*weight",)),
        ("autodiff", ("*bias",)),
        ("weight", ("0.*",)),
        ("autodiff", ("2.weight", "0.bias")),
    ],
)
def test_some_of_the_parameters(estimator: str, patterns: tuple[str, ...]):
    spec = KernelSpec(gamma=0.7, estimator=estimator, draws=8, blocks=4, parameters=patterns)
    assert_estimate_is_its_definition(case("relu_mlp"), spec, estimator)


def test_auto_on_jumps_outside_of_layers_is_weight():
    spec = KernelSpec(gamma=1.0, draws=8, blocks=4, outputs="full")
    assert_estimate_is_its_definition(case("sign_unit"), spec, "weight")


def test_raw_scale_is_localized_over_the_square_of_the_number_of_parameters():
    entry = case("relu_mlp")
    for kind in FUNCTIONS:
        spec = KernelSpec(kind=kind, gamma=0.5, draws=8, blocks=4)
        local, raw = (
            estimate(entry.build(), entry.inputs(3), None, replace(spec, scale=s)) for s in ("localized", "raw")
        )
        assert_equal(raw.kernel * local.num_parameters**2, local.kernel, 1e-14)
        assert_equal(raw.stderr * local.num_parameters**2, local.stderr, 1e-14)
        assert raw.relative_error == local.relative_error
        assert (
            raw.relative_bias == pytest.approx(local.relative_bias) if kind == "nonlocal" else raw.relative_bias is None
        )


def test_the_statistic_only_chooses_which_kernel_is_shown():
    entry = case("relu_mlp")
    spec = KernelSpec(gamma=0.5, estimator="autodiff", draws=8, blocks=4)
    by_name = {name: estimate(entry.build(), entry.inputs(3), None, replace(spec, statistic=name)) for name in
               ("plugin", "unbiased", "both")}  # fmt: skip
    both = by_name["both"]
    for one in by_name.values():
        assert torch.equal(one.plugin, both.plugin)
        assert torch.equal(one.unbiased, both.unbiased)
        assert torch.equal(one.stderr, both.stderr)
    assert torch.equal(by_name["unbiased"].kernel, both.unbiased)
    assert torch.equal(by_name["plugin"].kernel, both.plugin)
    assert torch.equal(both.kernel, both.plugin)
    bias = float((both.plugin - both.unbiased).norm() / both.unbiased.norm())
    assert both.relative_bias == pytest.approx(bias)
    assert bias > 1e-3


def test_kernels_of_one_set_are_bitwise_symmetric_and_plugin_is_positive():
    entry = case("relu_mlp")
    for kind in FUNCTIONS:
        spec = KernelSpec(kind=kind, gamma=0.5, draws=8, blocks=4, outputs="full")
        one = estimate(entry.build(), entry.inputs(5), None, spec)
        for values in (one.kernel, one.stderr, one.unbiased):
            assert values is None or torch.equal(values, values.T)
        eigenvalues = torch.linalg.eigvalsh(one.kernel)
        assert float(eigenvalues[0]) > -1e-10 * float(eigenvalues[-1])


def test_intervals_are_student_s_about_the_unbiased_estimate():
    entry = case("relu_mlp")
    one = estimate(entry.build(), entry.inputs(3), None, KernelSpec(gamma=0.5, statistic="plugin", draws=8, blocks=4))
    low, high = one.interval(0.95)
    assert_equal(0.5 * (low + high), one.unbiased, 1e-12)
    assert_equal(high - low, 2 * 3.182446305284263 * one.stderr, 1e-12)  # t(0.975), 3 degrees of freedom, from a table
    covariance = estimate(entry.build(), entry.inputs(3), None, KernelSpec(kind="covariance", draws=12, blocks=4))
    low, high = covariance.interval(0.9)
    assert_equal(0.5 * (low + high), covariance.kernel, 1e-12)
    assert_equal(high - low, 2 * 2.353363434801824 * covariance.stderr, 1e-12)


@pytest.mark.parametrize(
    ("kind", "estimator"),
    [("nonlocal", "weight"), ("nonlocal", "autodiff"), ("averaged", "auto"), ("covariance", "auto")],
)
def test_same_seed_same_bits_other_seed_other_draws(kind: str, estimator: str):
    entry = case("relu_mlp")
    spec = KernelSpec(kind=kind, gamma=0.5, estimator=estimator, draws=8, blocks=4, seed=5)
    one, again, other = (estimate(entry.build(), entry.inputs(4), None, replace(spec, seed=seed)) for seed in (5, 5, 6))
    assert torch.equal(one.kernel, again.kernel)
    assert torch.equal(one.stderr, again.stderr)
    assert not torch.isclose(one.kernel, other.kernel, rtol=1e-6).any()


@pytest.mark.parametrize(("estimator", "batch"), [("weight", 1), ("autodiff", 2), ("weight", 4), ("autodiff", 9)])
def test_batches_change_rounding_at_most(estimator: str, batch: int):
    entry = case("convnet")
    spec = KernelSpec(gamma=0.5, estimator=estimator, draws=8, blocks=4, outputs="full")
    whole = estimate(entry.build(), entry.inputs(5), entry.inputs(3, seed=2), spec)
    parts = estimate(entry.build(), entry.inputs(5), entry.inputs(3, seed=2), spec, batch=batch)
    for name in ("plugin", "unbiased", "stderr"):
        assert_equal(getattr(parts, name), getattr(whole, name), 1e-12)


@pytest.mark.parametrize(
    ("kind", "estimator"),
    [("nonlocal", "weight"), ("nonlocal", "autodiff"), ("averaged", "auto"), ("covariance", "auto")],
)
def test_single_precision_agrees_with_double(kind: str, estimator: str):
    """Rounding of the model by 2^-24, magnified by |f|/|Δ| in differences and by cancellation between blocks."""
    entry = case("tanh_mlp")
    spec = KernelSpec(kind=kind, gamma=1.0, estimator=estimator, draws=32, blocks=4, statistic="plugin")
    double = estimate(entry.build(), entry.inputs(6), None, spec)
    single = estimate(entry.build(), entry.inputs(6), None, spec, dtype=torch.float32)
    assert single.kernel.dtype == single.stderr.dtype == torch.float32
    assert double.kernel.dtype == torch.float64
    for name in ("kernel", "unbiased", "stderr"):
        if getattr(double, name) is not None:
            assert_equal(getattr(single, name).double(), getattr(double, name), 32 * 2.0**-24)


@pytest.mark.parametrize(("kind", "estimator"), [("nonlocal", "autodiff"), ("averaged", "auto")])
@pytest.mark.parametrize("name", ["tanh_mlp", "relu_mlp", "convnet", "attention"])
def test_small_ranges_give_the_local_kernel_by_gradients(name: str, kind: str, estimator: str):
    entry = case(name)
    spec = KernelSpec(kind=kind, gamma=1e-6, estimator=estimator, draws=8, blocks=4, outputs="full")
    one = estimate(entry.build(), entry.inputs(4), None, spec)
    assert_equal(one.kernel, local_kernel(entry.build(), entry.inputs(4), outputs="full"), 1e-4)


def test_small_ranges_give_the_local_kernel_by_differences():
    """At γ = 1e-4 the kernel equals the local one to 1e-3; the rest is noise, as the estimate itself states."""
    entry, local = case("tanh_mlp"), local_kernel(case("tanh_mlp").build(), case("tanh_mlp").inputs(4)).numpy()
    for kind in ("nonlocal", "covariance"):
        spec = KernelSpec(
            kind=kind, gamma=1e-4, estimator="auto" if kind == "covariance" else "weight", draws=2048, blocks=16
        )
        one = estimate(entry.build(), entry.inputs(4), None, spec)
        centre = one.kernel if one.unbiased is None else one.unbiased
        assert float(one.stderr.max()) < 0.15 * local.diagonal().mean()
        assert np.all(np.abs(centre.numpy() - local) < 5.5 * one.stderr.numpy())
