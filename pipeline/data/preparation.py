"""Preparing the arrays of a source for a model: class labels, finite numbers, normalised float32 or whole numbers.

A channel is a feature of a vector, or an entry along the first axis of an example with three or more axes (a colour of
an image); an example with two axes (height, width) is one channel. Sums and differences are taken in float64, a block
of rows at a time, so that no float64 copy of the data is held.

Axes: n examples, T targets of one example, channels.
"""

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64, Num, Shaped

from nntk_dist.errors import DataError
from pipeline.data.source import Source

BLOCK_ELEMENTS = 2**22


def encode_targets(
    source: Source, train_rows: Int64[np.ndarray, " train"], test_rows: Int64[np.ndarray, " test"]
) -> tuple[Shaped[np.ndarray, "train *T"], Shaped[np.ndarray, "test *T"], int | None]:
    """Encode the targets of the selected rows.

    Floats are regression targets, float64 (n, T). Integers, booleans and strings are classes, int64 (n,): 0 … C-1 in
    the sorted order of all classes of the whole source, selected or not.

    Args:
        source: holds the targets.
        train_rows: indices of the training rows.
        test_rows: indices of the test rows.

    Returns:
        Training targets, test targets, and the number of classes (None for regression).

    Raises:
        DataError: targets have another type or shape, differ in type or width between the sets, or are not finite.
    """
    sets = [source.train] if source.test is None else [source.train, source.test]
    arrays = [_targets(rows.targets, rows.name) for rows in sets]
    if len({(_form(array), array.shape[1:]) for array in arrays}) > 1:
        described = " and ".join(f"{array.dtype} {array.shape}" for array in arrays)
        raise DataError(f"the targets of {sets[0].name} and of its test set differ: {described}; give both one form")
    num_classes = None
    if _form(arrays[0]) != "real":
        # labels of the two sets may be stored in different integer types, or lengths of strings
        classes, codes = np.unique(np.concatenate(arrays), return_inverse=True)
        num_classes = len(classes)
        arrays = np.split(codes.astype(np.int64), [len(arrays[0])])[: len(sets)]
    train_targets, test_targets = arrays[0][train_rows], arrays[-1][test_rows]
    if num_classes is None:
        _check_finite(train_targets, train_rows, f"targets of {sets[0].name}", np.float64)
        _check_finite(test_targets, test_rows, f"targets of {sets[-1].name}", np.float64)
    return train_targets, test_targets, num_classes


Given = tuple[Any, Int64[np.ndarray, " n"], str]  # inputs of some rows, the rows, and their name in messages


def prepare_inputs(
    train: Given, test: Given, *, normalize: bool
) -> tuple[tuple[np.ndarray, np.ndarray], Float64[np.ndarray, " channels"], Float64[np.ndarray, " channels"]]:
    """Return the inputs of both sets as a model gets them, and the mean and deviation of each channel.

    Floating-point inputs, pixels (uint8) and booleans become float32 and are normalised. Other whole numbers, such as
    token ids, keep their type.

    Args:
        train: the training inputs.
        test: the test inputs, None if there are none.
        normalize: whether to subtract the mean and divide by the deviation of the training inputs.

    Raises:
        DataError: inputs are not finite real numbers, or differ in shape or type between the sets.
    """
    inputs, test_inputs = checked_inputs(*train), None if test[0] is None else checked_inputs(*test)
    if test_inputs is None:
        test_inputs = inputs[:0]
    inputs, test_inputs = (each[:, None] if each.ndim == 1 else each for each in (inputs, test_inputs))
    if test_inputs.shape[1:] != inputs.shape[1:]:
        raise DataError(
            f"examples of {test[2]} have shape {test_inputs.shape[1:]}, the training examples {inputs.shape[1:]}; give "
            "both one shape"
        )
    if keeps_type(inputs) != keeps_type(test_inputs):
        raise DataError(
            f"examples of {test[2]} have the type {test_inputs.dtype}, the training examples {inputs.dtype}; give both "
            "floating-point numbers or both whole numbers"
        )
    channels = num_channels(inputs.shape[1:])
    mean, deviation = np.zeros(channels), np.ones(channels)
    if keeps_type(inputs):
        common = np.result_type(inputs, test_inputs)
        return (inputs.astype(common), test_inputs.astype(common)), mean, deviation
    if normalize:
        mean, deviation = fit_normalization(inputs)
    return (normalized(inputs, mean, deviation), normalized(test_inputs, mean, deviation)), mean, deviation


def keeps_type(inputs: Shaped[np.ndarray, "..."]) -> bool:
    """Return whether inputs are whole numbers other than pixels and booleans."""
    return inputs.dtype.kind in "iu" and inputs.dtype != np.uint8


def checked_inputs(
    inputs: Shaped[np.ndarray, "n *shape"], rows: Int64[np.ndarray, " n"], name: str
) -> Shaped[np.ndarray, "n *shape"]:
    """Return inputs in a type that torch has, after checking that float32 can hold floating-point ones.

    Args:
        inputs: of the selected rows.
        rows: their indices in the source.
        name: names the source in messages.

    Raises:
        DataError: they are not real numbers, have no feature, or are not finite in float32, or too large for int64.
    """
    if inputs.dtype.kind not in "biuf":
        raise DataError(f"inputs of {name} have the type {inputs.dtype}; give real numbers")
    if inputs[0].size == 0:
        raise DataError(f"inputs of {name} have the shape {inputs.shape}: examples without a value; give at least one")
    if inputs.dtype.kind == "f":
        _check_finite(inputs, rows, f"inputs of {name}", np.float32)
    if inputs.dtype.kind == "u" and inputs.dtype != np.uint8:
        if inputs.max() > np.iinfo(np.int64).max:
            raise DataError(f"inputs of {name} hold {inputs.max()}; give whole numbers that int64 can hold")
        return inputs.astype(np.int64)
    return inputs.astype(inputs.dtype.newbyteorder("="), copy=False)


def fit_normalization(
    inputs: Num[np.ndarray, "n *shape"],
) -> tuple[Float64[np.ndarray, " channels"], Float64[np.ndarray, " channels"]]:
    """Return mean and standard deviation (squares divided by the count) of each channel, in two passes over the data.

    A constant channel gets its value as the mean, and deviation 1.
    """
    count = inputs.size // num_channels(inputs.shape[1:])
    axes = (0, 2)
    lows, sums, highs = zip(
        *((block.min(axis=axes), block.sum(axis=axes), block.max(axis=axes)) for block in _blocks(inputs)), strict=True
    )
    low, mean, high = np.min(lows, axis=0), np.sum(sums, axis=0) / count, np.max(highs, axis=0)
    variance = sum(((block - mean[:, None]) ** 2).sum(axis=axes) for block in _blocks(inputs)) / count
    # by its range, since rounding in the mean leaves a constant channel a tiny variance, and that would be blown up
    constant = low == high
    return np.where(constant, low, mean), np.where(constant, 1.0, np.sqrt(variance))


def normalized(
    inputs: Num[np.ndarray, "n *shape"],
    mean: Float64[np.ndarray, " channels"],
    deviation: Float64[np.ndarray, " channels"],
) -> Float32[np.ndarray, "n *shape"]:
    """Return (inputs - mean) / deviation for each channel, in float32."""
    result = np.empty(inputs.shape, dtype=np.float32)
    start = 0
    for block in _blocks(inputs):
        stop = start + len(block)
        result[start:stop] = ((block - mean[:, None]) / deviation[:, None]).reshape(-1, *inputs.shape[1:])
        start = stop
    return result


def num_channels(input_shape: tuple[int, ...]) -> int:
    """Return the number of channels of an example of this shape."""
    return 1 if len(input_shape) == 2 else input_shape[0]


def _blocks(inputs: Num[np.ndarray, "n *shape"]) -> Iterator[Float64[np.ndarray, "rows channels values"]]:
    channels = num_channels(inputs.shape[1:])
    rows = max(1, BLOCK_ELEMENTS // prod(inputs.shape[1:]))
    for start in range(0, len(inputs), rows):
        block = inputs[start : start + rows]
        yield block.reshape(len(block), channels, -1).astype(np.float64)


def _targets(targets: Shaped[np.ndarray, "n *shape"], name: str) -> Shaped[np.ndarray, "n *T"]:
    """Return labels (n,), or float64 values (n, T)."""
    if targets.dtype.kind in "OT":  # strings, as Arrow and Zarr hand them over
        if not all(isinstance(value, str) for value in targets.flat):
            raise DataError(f"targets of {name} mix types or miss values; give integers, class names or floats")
        targets = np.array(targets.tolist())
    if targets.dtype.kind not in "biufUS":
        raise DataError(f"targets of {name} have the type {targets.dtype}; give integers, class names or floats")
    if targets.dtype.kind == "f" and targets.ndim <= 2 and targets[:1].size:
        return targets.reshape(len(targets), -1).astype(np.float64)
    if targets.dtype.kind != "f" and targets.shape in ((len(targets),), (len(targets), 1)):
        return targets.reshape(-1)
    raise DataError(
        f"targets of {name} are {targets.dtype} of shape {targets.shape}; "
        "labels must have the shape (n,), and real targets (n,) or (n, T) as floats"
    )


def _form(targets: Shaped[np.ndarray, "n *T"]) -> str:
    return {"f": "real", "U": "text", "S": "text"}.get(targets.dtype.kind, "integer")


def _check_finite(values: Num[np.ndarray, "n *shape"], rows: Int64[np.ndarray, " n"], what: str, dtype: type) -> None:
    num_bad, bad_rows = 0, []
    step = max(1, BLOCK_ELEMENTS // prod(values.shape[1:]))
    for start in range(0, len(values), step):
        block = values[start : start + step]
        with np.errstate(over="ignore"):  # too large for the type is what is looked for
            bad = ~np.isfinite(block.astype(dtype)).reshape(len(block), -1)
        num_bad += int(bad.sum())
        bad_rows.extend(rows[start : start + step][bad.any(axis=1)].tolist())
    if num_bad:
        raise DataError(
            f"{what} hold {num_bad} values that are NaN, infinite or too large for {np.dtype(dtype).name}, in "
            f"{len(bad_rows)} of the {len(values)} selected rows, the first of them row {min(bad_rows)}; "
            "remove these rows or fill the gaps"
        )
