"""Examples of several parts as rows of bytes: what is packed comes back, under batches, vmap and other dtypes."""

import numpy as np
import pytest
import torch

from nntk_dist.errors import ArgumentError
from nntk_dist.models.structured import Layout, is_structured


def examples(n=5):
    generator = torch.Generator().manual_seed(0)
    return {
        "ids": torch.randint(-9, 9, (n, 3), generator=generator),
        "mask": torch.rand(n, 7, generator=generator) > 0.5,
        "scale": torch.rand(n, generator=generator),
        "image": torch.randint(0, 255, (n, 2, 3, 1), generator=generator).to(torch.uint8),
        "phase": torch.randn(n, 2, dtype=torch.complex64, generator=generator),
    }


def test_parts_come_back_as_they_were():
    parts = examples()
    layout = Layout.of(parts, "x1", torch.float32)
    packed = layout.pack(parts, "x1")
    assert packed.shape == (5, 24 + 8 + 8 + 8 + 16)
    for name, values in layout.unpack(packed, torch.float32).items():
        assert values.dtype == parts[name].dtype
        assert torch.equal(values, parts[name])


def test_rows_are_examples_in_any_selection():
    parts = examples()
    layout = Layout.of(parts, "x1", torch.float32)
    packed = layout.pack(parts, "x1")
    for chosen in (slice(1, 4), torch.tensor([3, 0]), slice(None, None, 2)):
        for name, values in layout.unpack(packed[chosen], torch.float32).items():
            assert torch.equal(values, parts[name][chosen])
    sums = torch.func.vmap(lambda row: layout.unpack(row[None], torch.float32)["scale"].sum())(packed)
    assert torch.equal(sums, parts["scale"])


def test_floating_parts_take_the_dtype_of_the_model():
    parts = {"x": np.linspace(0, 1, 4), "ids": np.arange(4, dtype=">i4")[::-1]}
    layout = Layout.of(parts, "x1", torch.float64)
    unpacked = layout.unpack(layout.pack(parts, "x1"), torch.float64)
    assert np.array_equal(unpacked["x"].numpy(), parts["x"])
    assert unpacked["ids"].tolist() == [3, 2, 1, 0]
    halved = Layout.of(parts, "x1", torch.float32)
    assert halved.unpack(halved.pack(parts, "x1"), torch.float64)["x"].dtype == torch.float64


@pytest.mark.parametrize("named", [True, False])
def test_floating_parts_in_another_dtype(named):
    parts = examples() if named else tuple(examples().values())
    layout = Layout.of(parts, "x1", torch.float32)
    wide, packed = layout.converted(layout.pack(parts, "x1"), torch.float64)
    assert wide.named == named
    assert [part.dtype for part in wide.parts] == ["int64", "bool", "float64", "uint8", "complex64"]
    for before, after in zip(examples().values(), wide.unpack(packed, torch.float32).values(), strict=True):
        assert torch.equal(before, after)


def test_a_tuple_has_numbered_parts():
    layout = Layout.of((torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)), "x1", torch.float32)
    assert not layout.named
    assert str(layout) == "0 float32[3], 1 int64[]"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "x1 has no parts; allowed: a tensor or NumPy array, or a dict or tuple of them"),
        ({"a": torch.ones(2), "b": torch.ones(3)}, r"x1 has parts with different numbers of examples \(a: 2, b: 3\)"),
        ({"a": "text"}, r"x1\['a'\] is str; allowed: a tensor or NumPy array"),
        ((torch.ones(2), torch.tensor(1.0)), r"x1\['?1'?\] is shape \(\)"),
    ],
)
def test_what_is_refused(given, message):
    assert is_structured(given)
    with pytest.raises(ArgumentError, match=message):
        Layout.of(given, "x1", torch.float32)


def test_other_parts_than_prepared_are_refused():
    parts = examples()
    layout = Layout.of(parts, "x1", torch.float32)
    with pytest.raises(ArgumentError, match=r"x2 has the parts ids int64\[4\], .*; allowed: ids int64\[3\]"):
        layout.pack({**parts, "ids": torch.zeros(5, 4, dtype=torch.int64)}, "x2")
