"""Memory of tiles that are on storage, used again for the next ones.

Fresh memory is given page by page as it is first touched: for the 2 × 64 MiB of a tile, 0.06 s of a core, a third of
what a tile took beyond its matrix products.

Axes: those of a result.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class ResultMemory:
    """Holds no more than was in use at once: what does not fit is let go before anything new is made."""

    _free: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._free)

    def empty(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """As `torch.empty`."""
        size = math.prod(shape)
        while self._free:
            memory = self._free.pop()
            if memory.numel() >= size and (memory.dtype, memory.device) == (dtype, device):
                return memory[:size].view(*shape)
        return torch.empty(shape, dtype=dtype, device=device)

    def give_back(self, results: Iterable[Tensor]) -> None:
        """What `empty` gave, and nobody reads any more."""
        self._free.extend(result.flatten() for result in results)

    def clear(self) -> None:
        """Let everything go that is not in use."""
        self._free.clear()
