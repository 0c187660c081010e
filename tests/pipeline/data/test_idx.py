"""IDX folders: plain and gzipped files, both spellings of their names, and every kind of damage."""

import gzip
import struct

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from nntk_dist.errors import NNTKError
from pipeline.data import load_dataset

RANDOM = np.random.default_rng(0)
IMAGES = {
    "train": RANDOM.integers(0, 256, (12, 5, 6), dtype=np.uint8),
    "t10k": RANDOM.integers(0, 256, (7, 5, 6), dtype=np.uint8),
}
LABELS = {name: (np.arange(len(images)) % 4).astype(np.uint8) for name, images in IMAGES.items()}


def encode(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(folder, *, suffix="", spelling="-idx"):
    for name in IMAGES:
        for kind, axes, arrays in (("images", 3, IMAGES), ("labels", 1, LABELS)):
            content = encode(arrays[name])
            content = gzip.compress(content) if suffix else content
            (folder / f"{name}-{kind}{spelling}{axes}-ubyte{suffix}").write_bytes(content)
    return f"idx:{folder}"


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("spelling", ["-idx", ".idx"])
def test_reading(tmp_path, suffix, spelling):
    data = load_dataset(write(tmp_path, suffix=suffix, spelling=spelling), train=9, test=None, normalize=False)
    assert data.input_shape == (1, 5, 6)
    assert data.num_classes == 4
    assert len(data.test.ids) == 7
    for split, name in ((data.train, "train"), (data.test, "t10k")):
        assert_array_equal(split.inputs[:, 0], (IMAGES[name] / np.float32(255))[split.ids])
        assert_array_equal(split.targets, LABELS[name][split.ids])


def test_normalization_is_one_mean_and_deviation(tmp_path):
    data = load_dataset(write(tmp_path), train=12, test=7)
    assert data.mean.shape == data.deviation.shape == (1,)
    np.testing.assert_allclose(data.mean, IMAGES["train"].mean() / 255, rtol=1e-6)
    np.testing.assert_allclose(data.deviation, IMAGES["train"].std() / 255, rtol=1e-6)


def damaged(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


TRAIN_IMAGES = "train-images-idx3-ubyte"
BAD = [
    (
        "",
        lambda path: path.unlink(),
        r"has no file 'train-images-idx3-ubyte' or 'train-images-idx3-ubyte.gz'; put the four",
    ),
    ("", damaged(lambda content: content[:-1]), r"announces 360 bytes of shape \(12, 5, 6\), but 359 follow"),
    ("", damaged(lambda content: content + b"0"), r"announces 360 bytes of shape \(12, 5, 6\), but 361 follow"),
    ("", damaged(lambda content: content[:9]), r"is no IDX file of unsigned bytes with 3 axes"),
    ("", damaged(lambda content: b""), r"is no IDX file of unsigned bytes with 3 axes \(it starts with ''"),
    ("", damaged(lambda content: b"\x00\x00\x0d\x03" + content[4:]), r"starts with '00 00 0d 03', not '00 00 08 03'"),
    ("", damaged(lambda content: encode(LABELS["train"])), r"starts with '00 00 08 01', not '00 00 08 03'"),
    ("", damaged(lambda content: encode(IMAGES["t10k"])), r"train has 7 images but 12 labels"),
    (".gz", damaged(lambda content: content[:-20]), r"ubyte.gz' is truncated or no gzip file"),
    (".gz", damaged(lambda content: b"plain" + content), r"ubyte.gz' is truncated or no gzip file"),
    (
        ".gz",
        damaged(lambda content: content[:30] + b"\xff" * 20 + content[50:]),
        r"ubyte.gz' is truncated or no gzip file",
    ),
]


@pytest.mark.parametrize(("suffix", "spoil", "message"), BAD)
def test_damage(tmp_path, suffix, spoil, message):
    source = write(tmp_path, suffix=suffix)
    spoil(tmp_path / f"{TRAIN_IMAGES}{suffix}")
    with pytest.raises(NNTKError, match=message) as caught:
        load_dataset(source, train=1, test=1)
    assert "\n" not in str(caught.value)


def test_empty_files(tmp_path):
    source = write(tmp_path)
    (tmp_path / TRAIN_IMAGES).write_bytes(encode(IMAGES["train"][:0]))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(encode(LABELS["train"][:0]))
    with pytest.raises(NNTKError, match=r"train is empty; give data with at least one row"):
        load_dataset(source, train=None, test=1)


def test_a_file_instead_of_a_folder(tmp_path):
    write(tmp_path)
    with pytest.raises(NNTKError, match=r"is not a folder; give the folder that holds train-images-idx3-ubyte"):
        load_dataset(f"idx:{tmp_path / TRAIN_IMAGES}", train=1, test=1)
