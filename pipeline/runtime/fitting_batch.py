"""The largest batch that fits: where memory runs out, the batch is halved and the work goes on.

A smaller batch changes the rounding of what comes after it, and nothing else. It is remembered for the life of a worker
and noted with every task that the worker finishes from then on, which is where a continued run begins. What is no
allocation of a pass (a killed process, a tile that does not fit) is not for this room.

Axes: none.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch

from nntk_dist.errors import NNTKError
from nntk_dist.runtime.memory import is_out_of_memory
from pipeline.records.ledger import LedgerRow

Result = TypeVar("Result")
BATCHED = ("features", "calibration", "gram", "test")  # stages whose tasks pass examples through the model
NUMBER = "batch"  # under which a task reports the batch that it came to


@dataclass
class FittingBatch:
    """A batch size that only ever falls; `size` examples."""

    size: int
    halved: bool = False

    def run(self, action: Callable[[int], Result]) -> Result:
        """What the action gives at the present batch, tried again from its beginning with half of it while memory runs
        out.

        Raises: NNTKError where a single example does not fit; whatever else the action raises.
        """
        while True:
            try:
                return action(self.size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.size == 1:
                    reason = str(error).partition("\n")[0]
                    raise NNTKError(
                        f"one example at a time does not fit into memory ({reason}); use fewer workers, a smaller "
                        "kernel.sketch, or a device with more memory"
                    ) from error
            # Behind the handler: the error's frames hold the tensors that did not fit.
            self.size, self.halved = max(1, self.size // 2), True
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def numbers(self) -> dict[str, float]:
        """What a task reports: nothing while the planned batch fits."""
        return {NUMBER: float(self.size)} if self.halved else {}


def remembered_batch(rows: Iterable[LedgerRow], planned: int) -> int:
    """The smallest batch that finished tasks came to, or the planned one."""
    return min((int(row.numbers[NUMBER]) for row in rows if NUMBER in row.numbers), default=planned)
