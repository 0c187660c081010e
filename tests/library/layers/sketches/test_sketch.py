"""The sketch of gradients: given its probes it is their explicit projection, and it is unbiased over probes.

The oracle forms every gradient by automatic differentiation, one example and one draw at a time, and projects it with
the library's probes by loops over parameters and columns.

Axes: S draws, R blocks, Q groups, n (n1, n2) examples, C outputs, P parameters, k columns.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nntk_dist.errors import NNTKError
from nntk_dist.estimators.gradients import GradientFeatures
from nntk_dist.layers.sketches import sketch as sketching
from nntk_dist.layers.sketches.sketch import Sketch, columns_of_sketch, groups_of_columns
from nntk_dist.models.builders import build_model
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.models.parameters import select_parameters
from nntk_dist.spec import KernelSpec
from tests.harness.projecting import sketch_of_gradients
from tests.harness.tools import (
    all_rows,
    assert_equal,
    calibration_of,
    draws_by_definition,
    estimates_of,
    prepared_features,
)
from tests.oracles import brute_force
from tests.oracles.cases import case

Array = np.ndarray
CASES = ["relu_mlp", "tied_weights", "repeated_layer", "raw_parameters", "linear_on_tokens", "embedding", "attention",
         "layer_norm", "convnet", "batch_norm", "conv1d", "language_model"]  # fmt: skip


def transformer() -> tuple[nn.Module, Tensor]:
    arguments = {"dim": 4, "depth": 1, "heads": 2, "hidden": 6, "patch": 2}
    model = build_model("transformer", arguments, input_shape=(1, 4, 4), num_outputs=2, seed=0)
    return prepare_model(model, dtype=torch.float64, device="cpu"), torch.randn(4, 1, 4, 4, dtype=torch.float64)


class LanguageModel(nn.Module):
    """Tokens with a tied head, positions in one row for all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(3, 2), nn.Embedding(3, 2)
        self.head = nn.Linear(2, 3, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.tokens(ids) + self.places(torch.arange(3)))
        return self.head(h).mean(1)


def language_model(n: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return prepare_model(LanguageModel(), dtype=torch.float64, device="cpu"), torch.randint(0, 3, (n, 3))


def problem(name: str, n: int = 4) -> tuple[nn.Module, Tensor]:
    if name == "language_model":
        return language_model(n)
    return transformer() if name == "transformer" else (case(name).build(), case(name).inputs(n))


def spec_of(outputs: str | int = "trace", sketch: int = 64, seed: int = 3) -> KernelSpec:
    return KernelSpec(
        estimator="autodiff", gamma=0.6, draws=8, blocks=4, seed=seed, outputs=outputs, contraction="sketch",
        sketch=sketch,
    )  # fmt: skip


def probe(sketch: Sketch, name: str, side: int, coordinates: Array) -> Array:
    """Complex probes at some coordinates, (…, m)."""
    signs = sketch.probes(name, side, torch.from_numpy(coordinates.ravel()), torch.float64).numpy()
    return ((signs[:, 0::2] + 1j * signs[:, 1::2]) / np.sqrt(2)).reshape(*coordinates.shape, -1)


def sketch_by_definition(
    gradients: Array, sketch: Sketch, shapes: dict[str, tuple[int, ...]], joined: dict[str, str]
) -> Array:
    """√(2/k) Σ_pc u_pcᵀ G_pc v_p of gradients (…, C, P), real and imaginary parts in turn: (…, k) if joint, with a
    different u for each output, else (…, C, k). `joined` biases are one more input of a weight: they share its u and
    have their own v.
    """
    size, num_outputs = sketch.num_columns, gradients.shape[-2]
    total = np.zeros((*gradients.shape[:-1], size // 2), dtype=complex)
    offset = 0
    for name, shape in shapes.items():
        rows = shape[0] if shape else 1
        count = int(np.prod(shape, dtype=int))
        part = gradients[..., offset : offset + count].reshape(*gradients.shape[:-1], rows, count // rows)
        offset += count
        output = np.arange(num_outputs) if sketch.joint else np.zeros(num_outputs, dtype=int)
        u = probe(sketch, joined.get(name, name), 0, output[:, None] * rows + np.arange(rows))
        v = probe(sketch, name, 1, np.arange(count // rows))
        if len(shape) < 2 and name not in joined:
            v = np.ones_like(v)
        for j in range(size // 2):
            total[..., j] += ((part @ v[:, j]) * u[..., j]).sum(-1)
    if sketch.joint:
        total = total.sum(-2)
    return np.sqrt(2 / size) * np.stack([total.real, total.imag], axis=-1).reshape(*total.shape[:-1], size)


def joined_biases(model: nn.Module) -> dict[str, str]:
    """Biases sketched with the weight of their layer: of Linear layers and convolutions, used by one module only."""
    owners = [
        (f"{path}.bias", f"{path}.weight")
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None
    ]
    return dict(owners)


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("relu_mlp", "full"),
        *((name, ("trace", "full")[i % 2]) for i, name in enumerate([*CASES, "transformer"])),
    ],
)
def test_the_sketch_is_the_projection_of_the_gradient(name, outputs):
    model, x = problem(name)
    features, decision = prepared_features(model, x, spec_of(outputs))
    assert isinstance(features, GradientFeatures)
    assert features.sketch is not None
    plan: Any = decision.plan
    assert plan.contraction.sketched.names() == set(decision.space.names)
    rows = all_rows(features, x)
    assert set(rows) == {"sketch"}
    draws = draws_by_definition(model, x, spec_of(), "autodiff", ("*",))
    means = brute_force.block_means(draws, np.arange(8) // 2)
    space = select_parameters(model)
    shapes = dict(zip(space.names, space.shapes, strict=True))
    assert features.sketched is not None
    own = {name for site in features.sketched.dense for _, name in site.parameters}
    joined = {bias: weight for bias, weight in joined_biases(model).items() if bias in own and weight in own}
    assert features.sketch.joint == (outputs == "trace")
    assert_equal(rows["sketch"].transpose(0, 1), sketch_by_definition(means, features.sketch, shapes, joined))


@pytest.mark.parametrize("outputs", ["trace", "full", 1])
def test_statistics_of_a_sketch_are_their_definitions(outputs):
    """Means, jackknife and its level from all columns, the sketch's own error from the scatter between groups."""
    spec, (model, x) = spec_of(outputs), problem("attention")
    features, _ = prepared_features(model, x, spec)
    rows, others = all_rows(features, x), all_rows(features, x[:2])
    shapes = [(len(part["sketch"]), 4, -1, 64) for part in (rows, others)]
    left, right = (
        part["sketch"].reshape(shape).numpy().transpose(1, 0, 2, 3)
        for part, shape in zip((rows, others), shapes, strict=True)
    )
    products = brute_force.block_products(left, right, outputs if outputs == "full" else "trace")
    result = estimates_of(features, rows, others, spec)
    assert_equal(result["plugin"], products.mean((0, 1)))
    assert_equal(result["unbiased"], brute_force.unbiased(products))
    each = [
        brute_force.unbiased(brute_force.block_products(a, b, outputs if outputs == "full" else "trace"))
        for a, b in zip(np.split(left, 8, axis=3), np.split(right, 8, axis=3), strict=True)
    ]
    between_groups = 8 * np.var(each, axis=0, ddof=1)
    draws_alone = brute_force.calibrated_stderr(products)
    assert_equal(result["stderr"], np.sqrt(draws_alone**2 + between_groups))
    noise = (draws_alone**2 + between_groups).sum()
    signal = (brute_force.unbiased(products) ** 2).sum() - noise
    assert calibration_of(features, rows, others, spec).relative_error == pytest.approx(np.sqrt(noise / signal))


def test_draws_in_portions_have_the_same_bits_and_outputs_in_portions_the_same_probes():
    model, x = problem("convnet")
    ids = torch.arange(len(x))
    for outputs in ("trace", "full"):
        features, _ = prepared_features(model, x, spec_of(outputs))
        whole = all_rows(features, x)["sketch"]
        parts = [features.compute(x, ids, draws, features.columns)["sketch"] for draws in (range(4), range(4, 8))]
        assert torch.equal(torch.cat(parts, dim=1), whole)
        assert_equal(features.compute(x[:1], ids[:1], range(8), features.columns)["sketch"], whole[:1])
        first, last = (features.compute(x, ids, range(8), columns)["sketch"] for columns in ((2, 0), (1,)))
        if outputs == "full":
            assert_equal(first, whole[:, :, [2, 0]])
        else:  # outputs add up: each has its own probes
            assert_equal(first + last, whole)
            assert not torch.allclose(first, whole)


@pytest.mark.parametrize("name", ["relu_mlp", "deep_relu_mlp"])
def test_formed_gradients_give_the_same_sketch(name):
    model, x = problem(name)
    spec = spec_of()
    formed, _ = prepared_features(model, x, replace(spec, contraction="means", sketch="auto"))
    features, _ = prepared_features(model, x, spec)
    assert isinstance(formed, GradientFeatures)
    assert isinstance(features, GradientFeatures)
    assert features.sketch is not None
    expected = sketch_of_gradients(formed, all_rows(formed, x), features.sketch)
    assert_equal(all_rows(features, x)["sketch"], expected["sketch"])


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_rows_in_batches_are_the_same_rows(batch):
    """Batches are padded, so that a row's bits depend only on its place in its batch."""
    model, x = problem("attention")
    features, _ = prepared_features(model, x, spec_of())
    ids = torch.arange(len(x))
    rows = features.compute(x, ids, range(8), features.columns, batch=batch)["sketch"]
    assert_equal(rows, features.compute(x, ids, range(8), features.columns)["sketch"])
    again = features.compute(x[:batch], ids[:batch], range(8), features.columns, batch=batch)["sketch"]
    assert torch.equal(rows[:batch], again)


def test_probes_that_do_not_fit_are_made_anew_and_the_same(monkeypatch):
    """Products in portions of columns change the rounding at most."""
    model, x = problem("transformer")
    features, _ = prepared_features(model, x, spec_of(sketch=512))
    whole = all_rows(features, x)["sketch"]
    monkeypatch.setattr(sketching, "KEPT_BYTES", 0)
    monkeypatch.setattr(sketching, "_ELEMENTS_AT_ONCE", 1)
    assert_equal(all_rows(features, x)["sketch"], whole, relative=1e-13)


@pytest.mark.parametrize(
    ("sketch", "message"),
    [
        (100, r"sketch is 100; allowed: auto, or a multiple of 16 \(8 groups .*\) from 64; the nearest is 96"),
        (0, r"sketch is 0; allowed: auto, or a multiple of 16 .* from 64; the nearest is 64"),
        (48, r"sketch is 48; allowed: auto, .* from 64; the nearest is 64"),
    ],
)
def test_sketches_that_no_groups_share(sketch, message):
    with pytest.raises(NNTKError, match=message):
        columns_of_sketch(sketch)


def test_there_are_about_as_many_groups_as_blocks_and_at_least_eight():
    assert [groups_of_columns(1024, blocks) for blocks in (4, 8, 9, 32, 1000)] == [8, 8, 16, 32, 32]
    assert [groups_of_columns(columns, 32) for columns in (64, 112, 128, 256, 272)] == [8, 8, 16, 32, 8]


@pytest.mark.parametrize("positions", [[], [2], [0, 4]])
@pytest.mark.parametrize("joint", [False, True])
def test_positions_without_a_gradient_add_nothing(joint, positions):
    """As in the layers of a language model behind which only the last position is read, or none."""
    generator = torch.Generator().manual_seed(0)
    delta = torch.zeros(2, 3, 5, 4, dtype=torch.float64)
    delta[:, :, positions] = torch.randn(2, 3, len(positions), 4, dtype=torch.float64, generator=generator)
    h = torch.randn(2, 5, 30, dtype=torch.float64, generator=generator)
    sketch = Sketch(3, 64, 8, ("weight",), joint)
    projector = sketching.Projector(sketch, range(3))
    total = projector.start(delta)
    projector.add_factors_(total, "weight", delta, h)
    expected = sketch.of_gradient("weight", torch.einsum("ncto,nti->ncoi", delta, h))
    torch.testing.assert_close(projector.finished(total), expected, rtol=1e-12, atol=1e-12)
