"""Tiles: any size against the whole, paired row sets against the diagonal, a few outputs at a time against all
together, in memory with any content; entries that no draw resolves.

Axes: S draws, R blocks, n (n1, n2) examples, C outputs.
"""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from nntk_dist.products.block_sums import Meeting
from nntk_dist.products.features import FeatureMap, slice_rows
from nntk_dist.products.wanted import Wanted
from nntk_dist.spec import KernelSpec
from nntk_dist.statistics.standard_errors import Calibration
from nntk_dist.statistics.tile_estimates import mirror_, tile_estimates
from tests.harness.tools import KINDS, all_rows, assert_equal, estimates_of, prepared_features, small, two_row_sets
from tests.oracles.cases import case

CALIBRATION = Calibration(level=0.7, relative_error=0.1, num_entries=1)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("kind", "estimator"), KINDS)
def test_the_paired_meeting_is_the_diagonal(kind, estimator, full):
    spec, features = small(kind, estimator, "full" if full else "trace")
    rows, _ = two_row_sets(features)
    crossed = tile_estimates(features, [(rows, rows)], Meeting(full), CALIBRATION, spec.scale)
    paired = tile_estimates(features, [(rows, rows)], Meeting(full, paired=True), CALIBRATION, spec.scale)
    assert set(paired) == set(crossed)
    for name, values in crossed.items():
        blocks = values.unflatten(0, (5, -1)).unflatten(2, (5, -1)) if full else values
        expected = torch.stack([blocks[i, :, i] for i in range(5)]) if full else values.diagonal()
        assert_equal(paired[name], expected, 1e-12)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("meeting", [Meeting(), Meeting(full=True), Meeting(paired=True), Meeting(True, paired=True)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_memory_of_any_content_is_overwritten_by_a_tile(symmetric, meeting, parts, monkeypatch):
    monkeypatch.setattr("nntk_dist.statistics.tile_estimates.WINDOW_ROWS", 3)
    monkeypatch.setattr("nntk_dist.statistics.tile_estimates.WINDOW_COLUMNS", 6)
    spec, features = small("nonlocal", "autodiff", "full" if meeting.full else "trace")
    rows, others = two_row_sets(features)
    others = rows if symmetric or meeting.paired else others
    made = []

    def used(shape, *, dtype, device):
        made.append(torch.full(shape, torch.inf, dtype=dtype, device=device))
        return made[-1]

    options = [(rows, others)] * parts, meeting, CALIBRATION, spec.scale
    tile = tile_estimates(features, *options, empty=used)
    assert [id(values) for values in tile.values()] == [id(values) for values in made]
    for name, values in tile_estimates(features, *options).items():
        assert torch.equal(tile[name], values)


@pytest.mark.parametrize("outputs", ["trace", "full"])
@pytest.mark.parametrize("height", [1, 2, 5])
@pytest.mark.parametrize(("kind", "estimator"), KINDS)
def test_tiles_of_any_size_are_parts_of_the_whole(kind, estimator, height, outputs):
    spec, features = small(kind, estimator, outputs)
    rows, others = two_row_sets(features)
    whole = tile_estimates(features, [(rows, others)], spec.meeting, CALIBRATION, spec.scale)
    width = 3 if outputs == "full" else 1
    for i in range(0, 5, height):
        for j in range(0, 4, 3):
            part = (slice_rows(rows, slice(i, i + height)), slice_rows(others, slice(j, j + 3)))
            tile = tile_estimates(features, [part], spec.meeting, CALIBRATION, spec.scale)
            for name, values in tile.items():
                there = whole[name][i * width : (i + height) * width, j * width : (j + 3) * width]
                torch.testing.assert_close(values, there, rtol=1e-12, atol=1e-12 * float(whole[name].abs().max()))


@pytest.mark.parametrize(("kind", "estimator"), KINDS)
def test_a_trace_may_be_summed_a_few_outputs_at_a_time(kind, estimator):
    spec, features = small(kind, estimator)
    x = case("tanh_mlp").inputs(5)
    everything = range(16)
    at_once = all_rows(features, x)
    some = [features.compute(x, torch.arange(len(x)), everything, columns) for columns in ((0, 2), (1,))]
    whole = tile_estimates(features, [(at_once, at_once)], spec.meeting, CALIBRATION, spec.scale)
    parts = tile_estimates(features, [(rows, rows) for rows in some], spec.meeting, CALIBRATION, spec.scale)
    for name, values in whole.items():
        assert_equal(parts[name], values, 1e-12)


def test_one_portion_of_outputs_is_forgotten_before_the_next_is_made():
    spec, features = small("nonlocal", "autodiff")
    x = case("tanh_mlp").inputs(5)
    made: list[Any] = []

    class OneByOne:
        def __len__(self):
            return 3

        def __iter__(self):
            for column in range(3):
                rows = features.compute(x, torch.arange(len(x)), range(16), (column,))
                prepared = features.prepare(rows, Wanted(stderr=True))
                made.extend(weakref.ref(values) for part in (rows, prepared) for values in part.values())
                yield prepared, prepared
                del rows, prepared
                assert not any(reference() is not None for reference in made)

    whole = tile_estimates(features, [(rows := all_rows(features, x), rows)], spec.meeting, CALIBRATION, spec.scale)
    parts = tile_estimates(features, OneByOne(), spec.meeting, CALIBRATION, spec.scale)
    assert len(made) > 6
    for name, values in whole.items():
        assert_equal(parts[name], values, 1e-12)


def test_without_a_calibration_there_is_no_standard_error_and_the_rest_is_the_same():
    spec, features = small("nonlocal", "autodiff")
    rows, others = two_row_sets(features)
    with_errors = tile_estimates(features, [(rows, others)], spec.meeting, CALIBRATION, spec.scale)
    without = tile_estimates(features, [(rows, others)], spec.meeting, None, spec.scale)
    assert set(with_errors) - set(without) == {"stderr"}
    for name, values in without.items():
        assert_equal(values, with_errors[name], 1e-12)


def test_a_tile_of_nothing_is_refused():
    spec, features = small("nonlocal", "weight")
    with pytest.raises(ValueError, match=r"a tile needs at least one part"):
        tile_estimates(features, [], spec.meeting, None, spec.scale)


def test_the_upper_triangle_is_mirrored():
    for size in (3, 600):
        values = torch.arange(float(size**2)).reshape(size, size)
        expected = values.triu() + values.triu(1).T
        mirror_(values)
        assert torch.equal(values, expected)


# Unresolved entries ---------------------------------------------------------------------------------------------------


def sign_rows(
    margins: list[float], *, gamma: float, draws: int = 16
) -> tuple[KernelSpec, FeatureMap, dict[str, Tensor]]:
    """A sign unit with the given θ·x; the larger it is, the fewer draws change it."""
    model = case("sign_unit").build()
    with torch.no_grad():
        model.theta.copy_(torch.tensor([1.0, 0, 0, 0, 0]))
    x = torch.tensor([[margin, 1.0, 0, 0, 0] for margin in margins], dtype=torch.float64)
    spec = KernelSpec(estimator="weight", variance_reduction="none", gamma=gamma, draws=draws, blocks=4)
    features, _ = prepared_features(model, x, spec)
    return spec, features, all_rows(features, x)


def test_entries_that_no_draw_changed_are_unresolved():
    spec, features, rows = sign_rows([0.1, 50.0, -0.2], gamma=1.0)
    result = estimates_of(features, rows, rows, spec)
    assert result["stderr"].isnan().tolist() == [[False, True, False], [True, True, True], [False, True, False]]
    assert float(result["unbiased"][1].abs().max()) == 0.0


def test_entries_that_one_block_alone_changed_are_unresolved_too():
    """Products of different blocks are then all zero: an estimate of 0 ± 0 that is known to be wrong."""
    spec, features, rows = sign_rows([0.1, 2.8], gamma=1.0)
    changed = rows["differences"][1, :, 0].ne(0).unflatten(0, (4, 4)).any(1)
    assert int(changed.sum()) == 1, "the margin of the second example is to be crossed in one block of four"
    result = estimates_of(features, rows, rows, spec)
    assert float(result["unbiased"][1, 1]) == 0.0
    assert float(result["plugin"][1, 1]) > 0.0
    assert result["stderr"].isnan().tolist() == [[False, False], [False, True]]
