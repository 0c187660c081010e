"""From the name of a source to a data set: open, select, label, read, check, normalise.

In this order, so that a wrong size or label costs no reading, and only the selected inputs are read.

Axes: see `pipeline.data.dataset`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from nntk_dist.errors import ArgumentError, DataError, check_choice
from nntk_dist.registration.callables import call_checked
from nntk_dist.registration.registry import Registry
from nntk_dist.runtime.arrays import magnitude_caution
from nntk_dist.runtime.warning import warn_caller
from pipeline.data.dataset import Dataset, Split
from pipeline.data.packing import pack_inputs
from pipeline.data.preparation import encode_targets, prepare_inputs
from pipeline.data.selection import select_rows
from pipeline.data.source import OpenSource, Source

# Each family is an `OpenSource`. Other packages add theirs as entry points of this group.
SOURCES: Registry[OpenSource] = Registry(
    "family of data.source",
    "nntk_dist.data_sources",
    {
        "sklearn": "pipeline.data.families.scikit_learn:open_sklearn",
        "synthetic": "pipeline.data.families.synthetic:open_synthetic",
        "npz": "pipeline.data.families.arrays:open_npz",
        "idx": "pipeline.data.families.idx:open_idx",
        "zarr": "pipeline.data.families.arrays:open_zarr",
        "parquet": "pipeline.data.families.tables:open_parquet",
        "csv": "pipeline.data.families.tables:open_csv",
        "arrow": "pipeline.data.families.tables:open_arrow",
        "python": "pipeline.data.families.python_function:open_python",
    },
)


def load_dataset(
    source: str,
    *,
    train: int | None,
    test: int | None,
    normalize: bool = True,
    seed: int = 0,
    input_columns: Sequence[str] | None = None,
    target_column: str | None = None,
    args: Mapping[str, Any] | None = None,
) -> Dataset:
    """Load a data set: a pure function of its arguments and of what the source holds.

    Args:
        source: `family:location`, with a family of `SOURCES`; each is described in its own file.
        train: number of training examples, or None for all.
        test: number of test examples, 0 for none, or None for all.
        normalize: subtract one mean and divide by one deviation for each channel, of the selected training examples;
            only of floating-point inputs and pixels (uint8).
        seed: of the selection. The id of an example depends on neither sizes nor seed.
        input_columns: columns that hold the inputs, for a source with columns.
        target_column: column that holds the targets, for a source with columns.
        args: further options of the source.

    Raises:
        ArgumentError: an unknown source, an option that it does not take, or sizes that do not fit.
        DataError: data that are missing, damaged, empty, malformed or not finite.

    Example:
        >>> load_dataset("sklearn:digits", train=100, test=10).train.inputs.shape
        (100, 1, 8, 8)
    """
    columns = {"input_columns": input_columns, "target_column": target_column}
    found = _open(source, {name: value for name, value in columns.items() if value is not None} | dict(args or {}))
    train_rows, test_rows = select_rows(found, train=train, test=test, seed=seed)
    train_targets, test_targets, num_classes = encode_targets(found, train_rows, test_rows)
    test_set = found.train if found.test is None else found.test
    train_inputs = found.train.read(train_rows)
    test_inputs = test_set.read(test_rows) if len(test_rows) else None
    if isinstance(train_inputs, np.ndarray):
        assert test_inputs is None or isinstance(test_inputs, np.ndarray)
        inputs, mean, deviation = prepare_inputs(
            (train_inputs, train_rows, found.train.name), (test_inputs, test_rows, test_set.name), normalize=normalize
        )
        layout = None
        _warn_of_magnitudes(train_inputs, train_rows, found.train.name)
        if test_inputs is not None:
            _warn_of_magnitudes(test_inputs, test_rows, test_set.name)
    else:
        inputs, layout = pack_inputs(
            (train_inputs, train_rows, found.train.name), (test_inputs, test_rows, test_set.name)
        )
        mean, deviation = np.zeros(0), np.ones(0)
    return Dataset(
        train=Split(train_rows, inputs[0], train_targets),
        test=Split(test_rows, inputs[1], test_targets),
        num_classes=num_classes,
        mean=mean,
        deviation=deviation,
        layout=layout,
    )


def _warn_of_magnitudes(inputs: np.ndarray, rows: np.ndarray, name: str) -> None:
    """Warn of a row of floating-point inputs that is too large for the others in float32, normalised or not."""
    if inputs.dtype.kind == "f" and inputs.size:
        flat = inputs.reshape(len(inputs), -1)
        largest = np.maximum(flat.max(axis=1), -flat.min(axis=1)).astype(np.float64)[:, None]
        caution = magnitude_caution(torch.from_numpy(largest), f"inputs of {name}", rows=rows, dtype=torch.float32)
        if caution is not None:
            warn_caller(caution)


def _open(source: str, options: Mapping[str, Any]) -> Source:
    """Open a source with options that it takes."""
    family, colon, location = source.partition(":")
    if not colon:
        raise ArgumentError(f"data.source is '{source}'; write FAMILY:LOCATION with one of {', '.join(SOURCES)}")
    check_choice("family of data.source", family, SOURCES)
    what = f"data source '{source}'"
    found = call_checked(partial(SOURCES.get(family), location), options, what=what, failure=DataError)
    if not isinstance(found, Source):
        raise DataError(f"{what}: its family returned a {type(found).__name__}; it must return a Source")
    return found
