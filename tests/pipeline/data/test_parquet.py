"""Parquet files: images and numbers, one file, two files and folders, and every kind of unusable column."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from nntk_dist.errors import NNTKError
from pipeline.data import load_dataset

RANDOM = np.random.default_rng(0)
COLOUR = RANDOM.integers(0, 256, (11, 4, 5, 3), dtype=np.uint8)
GREY = COLOUR[..., 0]
LABELS = np.arange(11) % 3
NUMBERS = {"width": RANDOM.normal(size=11), "count": np.arange(11), "flag": LABELS == 0, "label": LABELS}


def png(pixels, mode=None):
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, format="PNG")
    return buffer.getvalue()


def images(pixels=COLOUR, *, struct=True):
    encoded = [png(picture) for picture in pixels]
    return [{"bytes": data, "path": None} for data in encoded] if struct else encoded


def write(path, columns, row_group_size=4):
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return f"parquet:{path}"


def load(source, train=6, test=5, **options):
    return load_dataset(source, train=train, test=test, normalize=False, **options)


@pytest.mark.parametrize("struct", [True, False])
@pytest.mark.parametrize("pixels", [COLOUR, GREY])
def test_images(tmp_path, pixels, struct):
    source = write(tmp_path / "data.parquet", {"id": range(11), "img": images(pixels, struct=struct), "label": LABELS})
    data = load(source)
    expected = pixels.transpose(0, 3, 1, 2) if pixels.ndim == 4 else pixels[:, None]
    assert data.num_classes == 3
    for split in (data.train, data.test):
        assert_array_equal(split.inputs, (expected / np.float32(255))[split.ids])
        assert_array_equal(split.targets, LABELS[split.ids])


def test_other_modes_become_colour_or_grey(tmp_path):
    for mode, channels in (("P", 3), ("RGBA", 3), ("LA", 3), ("1", 1)):
        encoded = [png(picture, mode) for picture in COLOUR]
        source = write(tmp_path / "data.parquet", {"image": encoded, "y": LABELS})
        assert load(source).input_shape == (channels, 4, 5)


def test_only_selected_images_are_decoded(tmp_path):
    encoded = images()
    order = load(write(tmp_path / "data.parquet", {"img": encoded, "label": LABELS}), train=11, test=0).train.ids
    encoded[order[7]] = {"bytes": b"damaged", "path": None}
    source = write(tmp_path / "data.parquet", {"img": encoded, "label": LABELS})
    assert len(load(source, train=7, test=3).train.ids) == 7
    with pytest.raises(NNTKError, match=rf"image in row {order[7]} cannot be decoded as an image \(unknown format\)"):
        load(source, train=8, test=3)


def test_numbers_by_default_and_by_name(tmp_path):
    source = write(tmp_path / "data.parquet", NUMBERS)
    data = load(source)
    table = np.stack([NUMBERS[name].astype(float) for name in ("width", "count", "flag")], axis=1)
    assert_array_equal(data.train.inputs, table[data.train.ids].astype(np.float32))
    chosen = load(source, input_columns=["count", "label"], target_column="width")
    assert chosen.num_classes is None
    assert_array_equal(chosen.train.inputs, np.stack([np.arange(11), LABELS], axis=1)[chosen.train.ids])
    assert_array_equal(chosen.train.targets[:, 0], NUMBERS["width"][chosen.train.ids])


@pytest.mark.parametrize("dictionary", [False, True])
def test_class_names(tmp_path, dictionary):
    names = pa.array([["b", "c", "a"][label] for label in LABELS])
    names = names.dictionary_encode() if dictionary else names
    data = load(write(tmp_path / "data.parquet", {"x": np.arange(11.0), "class": names}))
    assert_array_equal(data.train.targets, np.array([1, 2, 0])[LABELS[data.train.ids]])


def test_decimal_targets_are_real(tmp_path):
    values = pa.array(np.arange(11) / 4).cast(pa.decimal128(10, 2))
    data = load(write(tmp_path / "data.parquet", {"x": np.arange(11.0), "y": values}))
    assert_array_equal(data.train.targets[:, 0], data.train.ids / 4)


def halves(folder):
    first = {name: values[:7] for name, values in NUMBERS.items()}
    second = {name: values[7:] for name, values in NUMBERS.items()}
    write(folder / "train.parquet", first)
    write(folder / "test.parquet", second)


def check_halves(source):
    data = load(source, train=None, test=3, input_columns=["count"])
    assert_array_equal(np.sort(data.train.ids), np.arange(7))
    assert_array_equal(data.train.inputs[:, 0], data.train.ids)
    assert_array_equal(data.test.inputs[:, 0], 7 + data.test.ids)


def test_two_files(tmp_path):
    halves(tmp_path)
    check_halves(f"parquet:{tmp_path / 'train.parquet'}, {tmp_path / 'test.parquet'}")


def test_columns_of_the_test_file_are_those_of_the_train_file_by_name(tmp_path):
    halves(tmp_path)
    source = f"parquet:{tmp_path / 'train.parquet'}, {tmp_path / 'test.parquet'}"
    expected = load(source, train=None, test=3)
    second = pq.read_table(tmp_path / "test.parquet")
    pq.write_table(second.select(second.column_names[::-1]), tmp_path / "test.parquet")
    assert_array_equal(load(source, train=None, test=3).test.inputs, expected.test.inputs)
    renamed = ["other" if name == "count" else name for name in second.column_names]
    pq.write_table(second.rename_columns(renamed), tmp_path / "test.parquet")
    with pytest.raises(NNTKError, match=r"test\.parquet' has no column 'count'; it has"):
        load(source, train=None, test=3)


def test_a_path_with_a_comma(tmp_path):
    source = write(tmp_path / "a,b.parquet", NUMBERS)
    assert len(load(source).train.ids) == 6


def test_folders(tmp_path):
    halves(tmp_path)
    check_halves(f"parquet:{tmp_path}")


def test_a_folder_of_parts_counts_rows_through(tmp_path):
    for part in range(3):
        rows = slice(3 * part, 3 * part + 3)
        write(tmp_path / f"train-{part}.parquet", {name: values[rows] for name, values in NUMBERS.items()})
    write(tmp_path / "test-0.parquet", {name: values[9:] for name, values in NUMBERS.items()})
    data = load(f"parquet:{tmp_path}", train=None, test=None, input_columns=["count"])
    assert_array_equal(np.sort(data.train.ids), np.arange(9))
    assert_array_equal(data.train.inputs[:, 0], data.train.ids)
    assert_array_equal(data.train.targets, LABELS[data.train.ids])


def with_gap(values, row):
    return [None if index == row else value for index, value in enumerate(values)]


IMG = images()
X = np.arange(11.0)
BAD = [
    ({"x": X}, {}, r"has 0 columns called label, .*; name the column of targets with data.target_column: x"),
    ({"x": X, "label": LABELS, "y": LABELS}, {}, r"has 2 columns called label, .*data.target_column: x, label, y"),
    ({"x": X, "label": LABELS}, {"target_column": "lable"}, r"has no column 'lable'; .*did you mean 'label'\?"),
    ({"x": X, "label": LABELS}, {"input_columns": ["xx"]}, r"has no column 'xx'; it has x, label"),
    ({"x": X, "label": LABELS}, {"input_columns": ["label"]}, r"inputs must be columns other than the target 'label'"),
    ({"x": X, "label": LABELS}, {"input_columns": []}, r"inputs must be columns other than the target 'label'"),
    ({"label": LABELS}, {}, r"inputs must be columns other than the target 'label'; name them with data.input_columns"),
    ({"name": ["a"] * 11, "label": LABELS}, {}, r"column 'name' of type string cannot be an input"),
    ({"a": IMG, "b": IMG, "label": LABELS}, {}, r"column 'a' of type struct.* cannot be an input beside others"),
    ({"x": X, "label": IMG}, {}, r"column 'label' of type struct.* cannot be the target"),
    ({"x": X, "label": [b"1"] * 11}, {}, r"column 'label' of type binary cannot be the target"),
    (
        {"x": X, "label": with_gap(LABELS.tolist(), 4)},
        {},
        r"has 1 missing targets, the first in row 4; remove these rows",
    ),
    ({"x": with_gap(X, 4), "label": LABELS}, {}, r"hold 1 values that are NaN, .* the first of them row 4"),
    ({"x": X, "y": with_gap(X, 4)}, {}, r"targets of .* hold 1 values that are NaN, .* the first of them row 4"),
    ({"img": with_gap(IMG, 4), "label": LABELS}, {}, r"image in row 4 has no image bytes"),
    (
        {"img": [*IMG[:10], {"bytes": IMG[0]["bytes"][:60], "path": None}], "label": LABELS},
        {},
        r"image in row 10 cannot be dec",
    ),
    (
        {"img": [*IMG[:10], *images(COLOUR[:1, :2])], "label": LABELS},
        {},
        r"image in row .* has shape .* give images of one size",
    ),
    (
        {"img": [*IMG[:10], *images(GREY[:1])], "label": LABELS},
        {},
        r"image in row .* has shape .* give images of one size",
    ),
    ({"img": images(GREY.astype(np.uint16)), "label": LABELS}, {}, r"has pixels of more than 8 bits \(mode I;16\)"),
    ({"x": X[:0], "label": LABELS[:0]}, {}, r"data.parquet' is empty; give data with at least one row"),
]


@pytest.mark.parametrize(("columns", "options", "message"), BAD)
def test_unusable_columns(tmp_path, columns, options, message):
    source = write(tmp_path / "data.parquet", columns)
    with pytest.raises(NNTKError, match=message) as caught:
        load(source, train=11, test=0, **options)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path):
    (tmp_path / "data.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(NNTKError, match=r"data.parquet' is no readable Parquet file \(.*\); write it again"):
        load(f"parquet:{tmp_path / 'data.parquet'}")


def test_damaged_pages(tmp_path):
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"x": RANDOM.normal(size=999), "label": np.zeros(999, int)}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[60:4000] = bytes(3940)
    path.write_bytes(content)
    with pytest.raises(NNTKError, match=r"is no readable Parquet file"):
        load(f"parquet:{path}")


@pytest.mark.parametrize("present", ["train", "test"])
def test_half_a_folder(tmp_path, present):
    write(tmp_path / f"{present}.parquet", NUMBERS)
    absent = "test" if present == "train" else "train"
    with pytest.raises(
        NNTKError, match=rf"has no {absent}\*.parquet; a folder needs train\*.parquet and test\*.parquet"
    ):
        load(f"parquet:{tmp_path}")


def test_a_missing_second_file(tmp_path):
    source = write(tmp_path / "train.parquet", NUMBERS)
    with pytest.raises(NNTKError, match=r"'.*none.parquet' does not exist"):
        load(f"{source},{tmp_path / 'none.parquet'}")
