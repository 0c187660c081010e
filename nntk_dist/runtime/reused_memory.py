"""Memory of tensors that nobody reads any more, used again for the next ones.

The system hands out fresh memory page by page as it is first touched: for the 128 MiB of a tile that takes 0.06 s of a
core, a third of what the tile costs beyond its matrix products. The C allocator cannot help: it maps blocks of more
than 32 MiB anew each time.

Axes: none.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor


@dataclass
class ReusedMemory:
    """Tensors in memory that earlier ones have given back.

    It holds at most the peak of the memory in use: if no free block is large enough, all free blocks are released. One
    thread may call `empty` while another calls `give_back`.

    Example:
        >>> memory = ReusedMemory()
        >>> first = memory.empty((2, 3), dtype=torch.float32, device="cpu")
        >>> memory.give_back([first])
        >>> memory.empty((3,), dtype=torch.float64, device="cpu").data_ptr() == first.data_ptr()
        True
    """

    _free: list[torch.UntypedStorage] = field(default_factory=list)

    def __len__(self) -> int:
        """Return how many pieces are free."""
        return len(self._free)

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Return an uninitialised tensor, in the smallest free piece of memory that is large enough.

        Args:
            shape: of the tensor.
            dtype: of the tensor.
            device: of the tensor.
        """
        num_bytes = prod(shape) * dtype.itemsize
        device = torch.device(device)
        sizes = [(each.nbytes(), index) for index, each in enumerate(self._free) if each.device == device]
        fitting = [(size, index) for size, index in sizes if size >= num_bytes]
        if not fitting:
            self._free.clear()
            return torch.empty(shape, dtype=dtype, device=device)
        storage = self._free.pop(min(fitting)[1])
        return torch.empty(0, dtype=dtype, device=device).set_(storage)[: prod(shape)].view(*shape)

    def give_back(self, tensors: Iterable[Tensor]) -> None:
        """Take back the memory of tensors that `empty` returned and nobody reads any more."""
        self._free.extend(tensor.untyped_storage() for tensor in tensors)

    def clear(self) -> None:
        """Let everything go that is free."""
        self._free.clear()
