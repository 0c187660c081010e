"""Random projections of the outputs: given its probes and directions, the sketch is its definition; it is unbiased.

The oracle forms the gradient of every output by automatic differentiation and projects it by loops, as in
`test_sketch`.

Axes: S draws, R blocks, Q groups, D directions, n examples, C outputs, P parameters, k columns.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nntk_dist import local_kernel, nonlocal_kernel, prepare_kernel
from nntk_dist.errors import ArgumentError
from nntk_dist.estimators.contraction import Setting, choose_contraction
from nntk_dist.estimators.gradients import GradientFeatures
from nntk_dist.layers.recording import Recording
from nntk_dist.layers.site_trial import plan_sites
from nntk_dist.layers.sketches import sketch as sketching
from nntk_dist.layers.sketches.projected_outputs import count_directions
from nntk_dist.layers.sketches.sketch import Sketch
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.models.parameters import select_parameters
from nntk_dist.spec import KernelSpec
from tests.harness.tools import all_rows, assert_equal, draws_by_definition, prepared_features
from tests.library.layers.sketches.test_sketch import CASES, joined_biases, probe, problem, spec_of
from tests.oracles import brute_force
from tests.oracles.statistics import assert_coverage, assert_mean_agrees, covered

GROUPS = 8


class Recurrent(nn.Module):
    """A model that vmap cannot take."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


def model_of(name: str) -> tuple[nn.Module, Tensor]:
    if name != "recurrent":
        return problem(name)
    torch.manual_seed(0)
    return prepare_model(Recurrent(), dtype=torch.float64, device="cpu"), torch.randn(4, 3, 2, dtype=torch.float64)


def classifier(num_outputs: int = 40) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, num_outputs))
    return model.double(), torch.randn(5, 3, dtype=torch.float64)


def projected_by_definition(
    gradients: np.ndarray, sketch: Sketch, shapes: dict[str, tuple[int, ...]], joined: dict[str, str]
) -> np.ndarray:
    """√(2/k) Σ_p u_pᵀ (Σ_c V_dc G_pc) v_p of gradients (…, C, P), real and imaginary parts in turn: (…, k).

    `joined` biases are one more input of a weight: they share its u and have their own v.
    """
    size, num_outputs = sketch.num_columns, gradients.shape[-2]
    signs = sketch.directions(range(num_outputs), num_outputs, torch.zeros(1, dtype=torch.float64)).numpy()
    assert set(signs.ravel()) == {-1.0, 1.0}
    projected = np.einsum("dc,...cp->...dp", signs, gradients)
    total, offset = np.zeros((*gradients.shape[:-2], size // 2), dtype=complex), 0
    for name, shape in shapes.items():
        rows = shape[0] if shape else 1
        count = int(np.prod(shape, dtype=int))
        part = projected[..., offset : offset + count].reshape(*projected.shape[:-1], rows, count // rows)
        offset += count
        u, v = (
            probe(sketch, joined.get(name, name), 0, np.arange(rows)),
            probe(sketch, name, 1, np.arange(count // rows)),
        )
        if len(shape) < 2 and name not in joined:
            v = np.ones_like(v)
        for j in range(size // 2):
            own = part[..., j // (size // 2 // sketch.num_directions), :, :]
            total[..., j] += ((own @ v[:, j]) * u[..., j]).sum(-1)
    return np.sqrt(2 / size) * np.stack([total.real, total.imag], axis=-1).reshape(*total.shape[:-1], size)


@pytest.mark.parametrize("name", [*CASES, "transformer", "recurrent"])
@pytest.mark.parametrize(("columns", "directions"), [(64, 32), (128, 32)])
def test_the_sketch_is_its_definition(name, columns, directions):
    model, x = model_of(name)
    features, decision = prepared_features(model, x, replace(spec_of(sketch=columns), output_projections=directions))
    assert isinstance(features, GradientFeatures)
    assert features.sketch is not None
    assert features.sketched is not None
    assert features.sketched.names() == set(decision.space.names)
    assert f"outputs projected on {directions} directions" in decision.contraction
    rows = all_rows(features, x)
    assert set(rows) == {"sketch"}
    means = brute_force.block_means(draws_by_definition(model, x, spec_of(), "autodiff", ("*",)), np.arange(8) // 2)
    space = select_parameters(model)
    shapes = dict(zip(space.names, space.shapes, strict=True))
    own = {name for site in features.sketched.dense for _, name in site.parameters}
    joined = {bias: weight for bias, weight in joined_biases(model).items() if bias in own and weight in own}
    assert_equal(rows["sketch"].transpose(0, 1), projected_by_definition(means, features.sketch, shapes, joined))


def test_a_pass_takes_a_direction_where_it_took_an_output(monkeypatch):
    model, x = classifier(130)
    taken = list[int]()
    gradients = Recording._gradients

    def counted(recording: Recording, origin: Any, directions: Tensor, sites: Any) -> Any:
        taken.append(len(directions))
        return gradients(recording, origin, directions, sites)

    options: dict[str, Any] = {"gamma": 0.1, "draws": 8, "contraction": "sketch", "sketch": 128}
    found = {}
    for asked in ("auto", 0, 64):
        spec = KernelSpec(**options, output_projections=asked)
        features, _ = prepared_features(model, x, spec)
        monkeypatch.setattr(Recording, "_gradients", counted)
        taken.clear()
        all_rows(features, x)
        monkeypatch.undo()
        found[asked] = max(taken)
    assert found == {"auto": 32, 0: 130, 64: 64}


def test_only_the_readout_stays_exact_beside_projected_outputs():
    model, x = classifier(300)
    space = select_parameters(model)
    setting = Setting(8, 8, 300, num_directions=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nntk_dist.estimators.contraction.AFFORDABLE_BYTES", 0)
        patch.setattr("nntk_dist.estimators.contraction.AFFORDABLE_OPERATIONS", 0)
        found = choose_contraction(plan_sites(model, space, x), space, "auto", 5, setting)
        assert found.sketched is not None
        assert found.sketched.names() == {f"{layer}.{name}" for layer in (0, 2) for name in ("weight", "bias")}
        assert [site.module for site in found.exact.outer] == ["4"] == [found.exact.readout]
        exact = choose_contraction(plan_sites(model, space, x), space, "means", 0, setting)
    assert exact.sketched is None
    assert "directions" not in exact.text


def test_outputs_and_columns_in_portions_change_rounding_at_most(monkeypatch):
    model, x = problem("transformer")
    spec = replace(spec_of(sketch=512), output_projections=64)
    features, _ = prepared_features(model, x, spec)
    whole, ids = all_rows(features, x)["sketch"], torch.arange(len(x))
    first, last = (features.compute(x, ids, range(8), columns)["sketch"] for columns in ((1,), (0,)))
    assert_equal(first + last, whole)
    assert not torch.allclose(first, whole)
    monkeypatch.setattr(sketching, "KEPT_BYTES", 0)
    monkeypatch.setattr(sketching, "_ELEMENTS_AT_ONCE", 1)
    assert_equal(all_rows(features, x)["sketch"], whole, relative=1e-13)


def test_groups_of_parameters_have_the_sketches_that_they_have_alone():
    """One group is exact and takes every output, the other is sketched along directions, in the same passes."""
    model, x = classifier(130)
    groups = {"first": "0.*", "others": ["2.*", "4.*"]}
    options: dict[str, Any] = {"gamma": 0.1, "draws": 8, "contraction": "sketch", "sketch": 64}
    found = nonlocal_kernel(model, x, parameters=groups, **options)
    for name, patterns in groups.items():
        alone = nonlocal_kernel(model, x, parameters={**groups, "unused": patterns}, **options)
        assert torch.equal(found[name].kernel, alone[name].kernel)


@pytest.mark.parametrize(
    ("asked", "outputs", "expected"),
    [("auto", 255, 0), ("auto", 256, 64), ("auto", 10**6, 64), (0, 10**6, 0), (128, 200, 128)],
)
def test_directions_are_a_sixteenth_of_the_numbers_if_that_is_a_quarter_of_the_outputs(asked, outputs, expected):
    assert count_directions(asked, 1024, 8, outputs) == expected


def test_directions_never_serve_two_groups():
    for columns in range(64, 2049, 16):
        for blocks in (1, 8, 16, 32):
            found = count_directions("auto", columns, blocks, 10**6)
            groups = sketching.groups_of_columns(columns, blocks)
            assert found % groups == 0
            assert columns // 2 % found == 0
            assert columns % (2 * groups) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_projections": 10, "sketch": 128}, r"allowed for a sketch of 128 .*: auto, 0 .*, or one of 32, 64"),
        ({"outputs": "full", "output_projections": 32}, "output_projections is 32; allowed for outputs full: auto, 0"),
        ({"contraction": "means", "sketch": "auto", "output_projections": 32}, "for contraction means: auto, 0"),
        ({"estimator": "activation", "output_projections": 32}, "estimator activation without a sketch of gradients"),
    ],
)  # fmt: skip
def test_projections_that_make_no_sense_are_refused(options, message):
    given = {"gamma": 0.1, "sketch": 64} | options
    with pytest.raises(ArgumentError, match=message):
        KernelSpec(**given)


def test_many_outputs_cost_no_more_than_their_directions_by_default():
    """300 outputs: a local kernel within its stated error of the exact one."""
    model, x = classifier(300)
    kernel = prepare_kernel(model, x, kind="local", sketch=1024)
    assert "outputs projected on 64 directions" in kernel.decision.contraction
    found, exact = kernel(x), local_kernel(model, x)
    assert found.stderr is not None
    assert ((found.kernel - exact).abs() < 5 * found.stderr).all()
    assert (found.kernel - exact).norm() < 0.2 * exact.norm()


@pytest.mark.statistical
def test_kernels_are_unbiased_and_their_intervals_cover():
    """With outputs whose gradients are almost the same, so that the projections are a good part of the error."""
    model, x = classifier()
    with torch.no_grad():
        readout = model.get_parameter("4.weight")
        readout.copy_(readout[:1] + 0.1 * readout)
    kernel = prepare_kernel(model, x, kind="local", sketch=256, output_projections=32)
    assert isinstance(kernel.features, GradientFeatures)
    assert kernel.features.sketch is not None
    values, errors = [], []
    for seed in range(200):
        features = replace(kernel.features, sketch=replace(kernel.features.sketch, seed=seed))
        found = replace(kernel, features=features)(x)
        assert found.stderr is not None
        values.append(found.kernel.numpy())
        errors.append(found.stderr.numpy())
    exact = local_kernel(model, x).numpy()
    assert_mean_agrees(np.stack(values), exact)
    assert_coverage(covered(np.stack(values), exact, np.stack(errors), GROUPS))
