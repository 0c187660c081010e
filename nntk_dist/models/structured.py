"""Examples of several parts, such as token ids and an attention mask, packed into one tensor of bytes.

As in NumPy's structured arrays, a row of bytes holds one example: all its parts, one after the other. What lies between
the user and the model (batches, padding, features, stores, checksums) then handles one tensor, whatever the parts are.
A `Layout` packs and unpacks; unpacked parts are views of the bytes. No model is called here.

Axes: n examples, b bytes of an example.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from nntk_dist.errors import ArgumentError
from nntk_dist.runtime.arrays import as_examples

_ALIGNMENT = 8  # bytes: the widest number of any part


@dataclass(frozen=True)
class Part:
    """One part of an example.

    Attributes:
        name: its key in a dict, or its place in a tuple.
        shape: its shape, without the axis of examples.
        dtype: the name of its dtype, such as `int64`.
        start: its first byte.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype."""
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def num_bytes(self) -> int:
        """The bytes of one example's part, without padding."""
        return math.prod(self.shape) * self.torch_dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class Layout:
    """The parts of an example, and whether they came as a dict (`named`) or as a tuple.

    Example:
        >>> examples = {"ids": torch.tensor([[1, 2], [3, 4]]), "scale": torch.ones(2)}
        >>> layout = Layout.of(examples, "x1", torch.float32)
        >>> packed = layout.pack(examples, "x1")
        >>> packed.shape, packed.dtype
        (torch.Size([2, 24]), torch.uint8)
        >>> layout.unpack(packed, torch.float64)["scale"]
        tensor([1., 1.], dtype=torch.float64)
    """

    parts: tuple[Part, ...]
    named: bool

    @classmethod
    def of(cls, examples: Any, name: str, dtype: torch.dtype) -> "Layout":
        """Return the layout of a dict or tuple of arrays.

        Args:
            examples: tensors or NumPy arrays with one leading axis of examples.
            name: the argument's name, with which messages begin.
            dtype: the dtype of floating-point parts.

        Raises:
            ArgumentError: there is no part, or one that is no array, or they differ in their number of examples.
        """
        tensors = _parts(examples, name)
        parts, start = [], 0
        for key, values in tensors.items():
            kept = dtype if values.is_floating_point() else values.dtype
            part = Part(key, tuple(values.shape[1:]), str(kept).removeprefix("torch."), start)
            parts.append(part)
            start += -(-part.num_bytes // _ALIGNMENT) * _ALIGNMENT
        return cls(tuple(parts), isinstance(examples, Mapping))

    def pack(self, examples: Any, name: str) -> UInt8[Tensor, "n b"]:
        """Return the examples as rows of bytes, on the device of their first part.

        Args:
            examples: as in `Layout.of`.
            name: the argument's name, with which messages begin.

        Raises:
            ArgumentError: the parts differ from this layout in name, shape or dtype.
        """
        tensors = _parts(examples, name)
        given = Layout.of(examples, name, self._floating)
        if given != self:
            raise ArgumentError(f"{name} has the parts {given}; allowed: {self}, as prepared")
        columns = []
        for part, values in zip(self.parts, tensors.values(), strict=True):
            contiguous = values.detach().to(part.torch_dtype, memory_format=torch.contiguous_format).contiguous()
            own = contiguous.reshape(len(values), -1).view(torch.uint8)
            columns.append(torch.nn.functional.pad(own, (0, -part.num_bytes % _ALIGNMENT)))
        return torch.cat(columns, 1)

    def unpack(self, packed: UInt8[Tensor, "n b"], dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the parts by name, floating-point ones in `dtype`."""
        parts = {}
        for part in self.parts:
            values = packed[:, part.start : part.start + part.num_bytes].view(part.torch_dtype)
            values = values.reshape(len(packed), *part.shape)
            parts[part.name] = values.to(dtype) if values.is_floating_point() else values
        return parts

    def converted(self, packed: UInt8[Tensor, "n b"], dtype: torch.dtype) -> tuple["Layout", UInt8[Tensor, "n c"]]:
        """Return the same examples with floating-point parts in another dtype, and their layout."""
        parts = self.unpack(packed, dtype)
        layout = replace(Layout.of(parts, "the examples", dtype), named=self.named)
        return layout, replace(layout, named=True).pack(parts, "the examples")

    @property
    def _floating(self) -> torch.dtype:
        """The dtype of floating-point parts."""
        return next((p.torch_dtype for p in self.parts if p.torch_dtype.is_floating_point), torch.float32)

    def __str__(self) -> str:
        return ", ".join(map(str, self.parts))


def is_structured(examples: Any) -> bool:
    """Return whether examples come as several parts, in a dict or a tuple."""
    return isinstance(examples, Mapping | tuple)


def _parts(examples: Any, name: str) -> dict[str, Tensor]:
    """The parts by name, as tensors on one device."""
    items = examples.items() if isinstance(examples, Mapping) else enumerate(examples)
    tensors = {str(key): as_examples(values, f"{name}[{key!r}]") for key, values in items}
    if not tensors:
        raise ArgumentError(f"{name} has no parts; allowed: a tensor or NumPy array, or a dict or tuple of them")
    counts = {key: len(values) for key, values in tensors.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{key}: {count}" for key, count in counts.items())
        raise ArgumentError(f"{name} has parts with different numbers of examples ({listed}); allowed: the same number")
    device = next(iter(tensors.values())).device
    return {key: values.to(device) for key, values in tensors.items()}
