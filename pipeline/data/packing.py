"""Inputs of several parts, such as token ids and a mask, as rows of bytes (`nntk_dist.models.structured`).

Parts are never normalised. Floating-point parts become float32, all others keep their type.

Axes: n examples, b bytes of an example.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from nntk_dist.errors import ArgumentError, DataError
from nntk_dist.models.output import LABELS
from nntk_dist.models.structured import Layout
from pipeline.data.dataset import Dataset, Split
from pipeline.data.preparation import Given, checked_inputs


def pack_inputs(train: Given, test: Given) -> tuple[tuple[UInt8[np.ndarray, "n b"], UInt8[np.ndarray, "m b"]], Layout]:
    """Return the inputs of both sets as rows of bytes, and their layout.

    Args:
        train: the training inputs, a dict or tuple of arrays.
        test: the test inputs, None if there are none.

    Raises:
        DataError: a part is not finite real numbers, or the parts differ between the sets.
    """
    parts = _checked(*train)
    layout = Layout.of(parts, f"inputs of {train[2]}", torch.float32)
    packed = layout.pack(parts, f"inputs of {train[2]}").numpy()
    if test[0] is None:
        return (packed, packed[:0]), layout
    try:
        return (packed, layout.pack(_checked(*test), f"inputs of {test[2]}").numpy()), layout
    except ArgumentError as error:  # other parts than those of the training set
        raise DataError(str(error)) from error


def with_labels(dataset: Dataset) -> Dataset:
    """Return the dataset with its targets as the part `labels` of every example, for outputs that compare with them.

    A dataset whose examples have such a part stays as it is.
    """
    if dataset.layout is not None and any(part.name == LABELS for part in dataset.layout.parts):
        return dataset
    train, test = (_labelled_parts(split, dataset.layout) for split in (dataset.train, dataset.test))
    layout = Layout.of(train, "inputs of the training set", torch.float32)
    splits = [
        replace(split, inputs=layout.pack(parts, "inputs").numpy() if len(split.ids) else np.empty((0, 0), np.uint8))
        for split, parts in ((dataset.train, train), (dataset.test, test))
    ]
    return replace(dataset, train=splits[0], test=splits[1], layout=layout)


def _labelled_parts(split: Split, layout: Layout | None) -> dict[str, Tensor]:
    inputs = torch.from_numpy(split.inputs)
    parts = {"inputs": inputs} if layout is None else layout.unpack(inputs, torch.float32)
    return {**parts, LABELS: torch.from_numpy(split.targets)}


def _checked(inputs: Any, rows: np.ndarray, name: str) -> Any:
    items = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    parts = {key: checked_inputs(values, rows, f"{name}[{key!r}]") for key, values in items}
    if not parts:
        raise DataError(f"inputs of {name} have no parts; give at least one array")
    return parts if isinstance(inputs, Mapping) else tuple(parts.values())
