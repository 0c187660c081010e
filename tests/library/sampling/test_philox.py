"""Random numbers: the published vectors of Philox4x32-10, slicing, independence of different streams, moments.

Axes: g groups, i index within a group's vector.
"""

import numpy as np
import pytest
import torch
from scipy import stats

from nntk_dist.sampling.philox import normal, normals_at, philox, uniform
from nntk_dist.sampling.philox_cpu import centred_words, philox_words, split_words
from nntk_dist.sampling.streams import Stream

GROUPS = torch.arange(5)

# Known answers of the reference implementation (Random123, kat_vectors): counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def reference_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Compute the ten rounds in Python's integers, which never overflow."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            (second >> 32) ^ c[1] ^ k[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ c[3] ^ k[1],
            first & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return tuple(c)


def words(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    tensors = [torch.tensor([word], dtype=torch.int64) for word in counter]
    return tuple(int(word) for word in philox((tensors[0], tensors[1], tensors[2], tensors[3]), key))


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    assert words(counter, key) == answer
    assert reference_philox(counter, key) == answer


def test_any_counter_agrees_with_unbounded_integers():
    rng = np.random.default_rng(0)
    for row in rng.integers(0, 2**32, size=(50, 6)).tolist():
        assert words(tuple(row[:4]), (row[4], row[5])) == reference_philox(tuple(row[:4]), (row[4], row[5]))


@pytest.mark.parametrize("positions", [(2**32 - 3, 2**32 + 3), (5 * 2**32 + 1, 5 * 2**32 + 7), (9, 10), (9, 9)])
@pytest.mark.parametrize("draw", [0, 65_535, [3, 0, 65_535]])
def test_the_words_of_a_cpu_are_those_of_every_device(draw, positions):
    groups, seed = [0, 5, 2**32 - 1], (7 << 32) + 2**32 - 1
    pairs = philox_words(positions, np.array(draw), np.array(groups), int(Stream.SKETCH), seed)
    ours = [word for pair in pairs for word in split_words(pair)]
    draws = draw if isinstance(draw, list) else [draw] * 3
    for row, (group, number) in enumerate(zip(groups, draws, strict=True)):
        for column, position in enumerate(range(*positions)):
            counter = (position & 0xFFFFFFFF, (position >> 32) | (number << 16), group, int(Stream.SKETCH))
            expected = reference_philox(counter, (seed & 0xFFFFFFFF, 7))
            assert tuple(int(word[row, column]) for word in ours) == expected
    centred = [word for pair in pairs for word in centred_words(pair)]
    assert all(np.array_equal(word + 0.5, own) for word, own in zip(ours, centred, strict=True))


def test_normals_come_from_the_words_that_the_contract_names():
    """Box–Muller on the counters (index, draw, group, stream) with the seed's two halves as key, in NumPy."""
    seed, draw, group = (7 << 32) + 3, 2, 4
    expected = []
    for position in range(3):
        word = np.array(reference_philox((position, draw << 16, group, int(Stream.SKETCH)), (3, 7)), dtype=np.float64)
        unit = (word + 0.5) / 2**32
        for radial, angular in ((unit[0], unit[1]), (unit[2], unit[3])):
            radius = np.sqrt(-2.0 * np.log(radial))
            expected += [radius * np.cos(2 * np.pi * angular), radius * np.sin(2 * np.pi * angular)]
    ours = normal(seed, Stream.SKETCH, torch.tensor([group]), 0, 12, draw=draw)[0].numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 0), (0, 1), (3, 5), (4, 8), (5, 70_003), (65_535, 65_537), (70_000, 70_003)]
)
def test_any_slice_is_a_slice_of_the_whole(start, stop):
    whole = normal(1, Stream.PARAMETER, GROUPS, 0, 70_003)
    assert torch.equal(normal(1, Stream.PARAMETER, GROUPS, start, stop), whole[:, start:stop])


def test_multiplied_normals_are_normals_that_are_multiplied():
    """In the requested dtype, in several portions, and starting inside a counter."""
    times = torch.linspace(-2.2, 0.3, len(GROUPS), dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        plain = normal(1, Stream.PARAMETER, GROUPS, 5, 70_003, dtype=dtype)
        ours = normal(1, Stream.PARAMETER, GROUPS, 5, 70_003, dtype=dtype, times=times)
        assert torch.equal(ours, plain * times.to(dtype)[:, None])


def test_numbers_at_scattered_counters_are_those_of_the_whole():
    """In any order and shape, also beyond 32 bits and batched by vmap."""
    counters = torch.tensor([[7, 0, 7], [9_999, 3, 1]])
    whole = normal(1, Stream.MODEL, GROUPS, 0, 40_000, draw=5)[3].reshape(-1, 4)
    ours = normals_at(1, Stream.MODEL, 3, counters, draw=5)
    assert torch.equal(ours, whole[counters])
    far = normal(1, Stream.MODEL, GROUPS[3:4], (1 << 49) + 4, (1 << 49) + 8, draw=5)[0]
    assert torch.equal(normals_at(1, Stream.MODEL, 3, torch.tensor((1 << 47) + 1), draw=5), far)
    batched = torch.func.vmap(lambda counter: normals_at(1, Stream.MODEL, 3, counter, draw=5))(counters)
    assert torch.equal(batched, ours)


def test_powers_of_uniforms_do_not_depend_on_how_many_are_made():
    """Torch computes powers of noncontiguous numbers by another function; radii are such powers."""
    groups = torch.arange(2048)
    one, several = (uniform(1, Stream.RADIUS, groups, count)[:, 0].contiguous() for count in (1, 5))
    assert uniform(1, Stream.RADIUS, groups, 1).is_contiguous()
    assert torch.equal(one ** (1 / 3), several ** (1 / 3))


def test_uniforms_begin_anywhere_a_counter_does():
    whole = uniform(1, Stream.MODEL, GROUPS, 103, draw=5)
    assert torch.equal(uniform(1, Stream.MODEL, GROUPS, 3, draw=5, start=100), whole[:, 100:])
    for start in (-4, 2, 1 << 50):
        with pytest.raises(ValueError, match=r"index range .* is outside 0:"):
            uniform(1, Stream.MODEL, GROUPS, 3, start=start)


def test_groups_are_drawn_alone_or_together_in_any_order():
    together = normal(1, Stream.PARAMETER, GROUPS, 2, 9)
    assert torch.equal(normal(1, Stream.PARAMETER, GROUPS.flip(0), 2, 9), together.flip(0))
    for group in GROUPS:
        assert torch.equal(normal(1, Stream.PARAMETER, group[None], 2, 9)[0], together[group])


def test_indices_beyond_32_bits_have_numbers_of_their_own():
    far = 1 << 36
    here, there = (normal(0, Stream.PARAMETER, GROUPS, start, start + 8) for start in (0, far))
    assert not torch.isclose(here, there).any()
    assert torch.equal(normal(0, Stream.PARAMETER, GROUPS, far + 3, far + 8), there[:, 3:])


def test_seed_stream_group_draw_and_index_all_matter():
    first = normal(1, Stream.PARAMETER, GROUPS[:1], 0, 64)
    others = [
        normal(2, Stream.PARAMETER, GROUPS[:1], 0, 64),
        normal(1 + (1 << 32), Stream.PARAMETER, GROUPS[:1], 0, 64),
        *(normal(1, stream, GROUPS[:1], 0, 64) for stream in Stream if stream is not Stream.PARAMETER),
        normal(1, Stream.PARAMETER, GROUPS[1:2], 0, 64),
        normal(1, Stream.PARAMETER, GROUPS[:1], 0, 64, draw=1),
        normal(1, Stream.PARAMETER, GROUPS[:1], 64, 128),
    ]
    distinct = torch.cat([first, *others]).flatten()
    assert len(torch.unique(distinct)) == len(distinct)


def test_single_precision_is_double_precision_rounded():
    double = normal(1, Stream.PARAMETER, GROUPS, 0, 1000)
    assert torch.equal(normal(1, Stream.PARAMETER, GROUPS, 0, 1000, dtype=torch.float32), double.float())


def test_normals_are_normal():
    """The Kolmogorov–Smirnov test at 0.1 %, and correlations of neighbours and of the two halves of a transform."""
    values = normal(0, Stream.PARAMETER, torch.arange(4), 0, 50_000).numpy()
    assert stats.kstest(values.ravel(), "norm").pvalue > 1e-3
    limit = 3.9 / np.sqrt(values.size)  # two-sided quantile at 0.01 %, for the ten correlations below
    for lag in range(1, 5):
        assert abs(np.mean(values[:, lag:] * values[:, :-lag])) < limit * 1.01
        assert abs(np.mean((values[:, lag:] ** 2 - 1) * (values[:, :-lag] ** 2 - 1)) / 2) < limit * 1.01
    assert abs(np.mean(values[0] * values[1])) < 2 * limit
    assert abs(np.mean(values**4) - 3.0) < 3.9 * np.sqrt(96 / values.size)


def test_uniforms_are_uniform_and_never_zero_or_one():
    values = uniform(0, Stream.RADIUS, torch.arange(1000), 101)
    assert values.shape == (1000, 101)
    assert float(values.min()) > 0
    assert float(values.max()) < 1
    assert stats.kstest(values.flatten().numpy(), "uniform").pvalue > 1e-3
    assert torch.equal(uniform(0, Stream.RADIUS, torch.arange(1000), 7), values[:, :7])


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3), (0, (1 << 50) + 1)])
def test_indices_out_of_range_are_refused(start, stop):
    with pytest.raises(ValueError, match=r"index range .* is outside 0:"):
        normal(0, Stream.PARAMETER, GROUPS, start, stop)
