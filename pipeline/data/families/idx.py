"""Folders of IDX files, the format of MNIST and its family, plain or gzipped, split as given.

Images become (1, height, width) with values in [0, 1]. Elements other than unsigned bytes are refused.

Axes: as the header of each file gives them.
"""

import gzip
import zlib
from math import prod
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from nntk_dist.errors import DataError
from pipeline.data.source import Source, SourceRows, existing_path

UNSIGNED_BYTE = 0x08


def open_idx(location: str) -> Source:
    """Open a folder's `train-…` and `t10k-…` files of images and labels.

    Args:
        location: path of the folder.

    Raises:
        DataError: a file is missing, truncated or no IDX file, or the counts of images and labels differ.
    """
    what = f"idx:{location}"
    folder = existing_path(location, what=what)
    if not folder.is_dir():
        raise DataError(
            f"{what} is not a folder; give the folder that holds train-images-idx3-ubyte[.gz] and its companions"
        )
    return Source(_rows(folder, "train", what), _rows(folder, "t10k", what))


def read_idx(path: Path, num_axes: int) -> UInt8[np.ndarray, "..."]:
    """Read one IDX file: two zero bytes, element type, number of axes, big-endian sizes, then the elements.

    Args:
        path: of the file; `.gz` is decompressed.
        num_axes: how many it must have.

    Raises:
        DataError: the file is damaged, of another format or type, or has another number of axes.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"'{path}' is truncated or no gzip file ({error}); download it again") from error
    header_bytes = 4 + 4 * num_axes
    if len(content) < header_bytes or content[:4] != bytes((0, 0, UNSIGNED_BYTE, num_axes)):
        raise DataError(
            f"'{path}' is no IDX file of unsigned bytes with {num_axes} axes (it starts with '{content[:4].hex(' ')}', "
            f"not '00 00 08 {num_axes:02x}'); download it again"
        )
    shape = tuple(int(size) for size in np.frombuffer(content, dtype=">u4", count=num_axes, offset=4))
    if len(content) - header_bytes != prod(shape):
        raise DataError(
            f"'{path}' is truncated or damaged: its header announces {prod(shape)} bytes of shape {shape}, "
            f"but {len(content) - header_bytes} follow; download it again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header_bytes).reshape(shape)


def _rows(folder: Path, prefix: str, what: str) -> SourceRows:
    images = read_idx(_find(folder, f"{prefix}-images", "idx3-ubyte", what), 3)
    labels = read_idx(_find(folder, f"{prefix}-labels", "idx1-ubyte", what), 1)
    name = f"{what} {prefix}"
    if len(images) != len(labels):
        raise DataError(f"{name} has {len(images)} images but {len(labels)} labels; the files belong to different sets")
    return SourceRows(name, labels, lambda rows: images[rows, None] / np.float32(255))


def _find(folder: Path, stem: str, ending: str, what: str) -> Path:
    for name in (f"{stem}-{ending}", f"{stem}.{ending}"):  # both spellings are in circulation
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise DataError(f"{what} has no file '{stem}-{ending}' or '{stem}-{ending}.gz'; put the four MNIST files there")
