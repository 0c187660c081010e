"""The set of tile names: exact, and small."""

import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.records.tile_names import TileSet

# Names that are nearly equal: a set that parsed numbers less strictly would confuse some of them.
ALIKE = [
    *("", "/", "metric", "train", "0", "/0", "00", "0/0", "/0/0", "//0", "x//0", "x/0", "x/0/0", "x/00", "x/0/00"),
    *("x/00/0", "x/-1", "x/+1", "x/1", "x/1/0", "x/0/1", "x1/0", "x/1_0", "x/10", "x/ 1", "x/1 ", "x/²", "x/١", "x/1/"),
    *("x/31/31", "x/32/31", "x/31/32", "x/0/1023", "x/0/1024", "x/1023", "x/1024", "1023", "1024", f"x/{10**30}"),
    *("a/b/3/5", "a/3/5", "3/5", "a/b/3", "b/3", "3", "a/1/2/3", "a/2/3", "1/2/3"),
]


def test_names_that_are_nearly_the_same_stay_apart():
    assert len(set(ALIKE)) == len(ALIKE)
    for number, name in enumerate(ALIKE):
        tiles = TileSet(ALIKE[:number])
        assert name not in tiles
        tiles.add(name)
        tiles.add(name)
        assert set(tiles) == set(ALIKE[: number + 1])
        assert len(tiles) == number + 1


@given(first=st.lists(st.sampled_from(ALIKE)), gone=st.lists(st.sampled_from(ALIKE)), added=st.sampled_from(ALIKE))
@example(first=ALIKE, gone=["train"], added="train")
def test_names_are_put_in_and_taken_out_as_of_a_set(first, gone, added):
    tiles, expected = TileSet(first), set(first)
    for name in gone:
        tiles.discard(name)
        expected.discard(name)
        assert name not in tiles
    assert tiles == expected
    tiles.add(added)
    assert tiles == expected | {added}
    assert len(tiles) == len(expected | {added})


def test_one_name_taken_out_leaves_the_others():
    for gone in ALIKE:
        tiles = TileSet(ALIKE)
        tiles.discard(gone)
        tiles.discard(gone)
        assert set(tiles) == set(ALIKE) - {gone}
        assert len(tiles) == len(ALIKE) - 1


def test_it_is_a_set():
    tiles = TileSet(["train/0/0", "train/0/1"])
    assert tiles == {"train/0/0", "train/0/1"}
    assert tiles != {"train/0/0"}
    assert TileSet() == frozenset()
    assert 7 not in tiles
    assert tiles & {"train/0/1", "x"} == {"train/0/1"}


@pytest.mark.statistical
def test_a_hundred_thousand_tiles_take_under_a_byte_each():
    names = [f"train/{i}/{j}" for i in range(447) for j in range(i, 447)]
    assert len(names) > 99_000
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tiles = TileSet(names)
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(tiles) == len(names)
    assert taken < len(names)
    assert all(name in tiles for name in names)
    assert "train/1/0" not in tiles
