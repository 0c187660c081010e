"""The largest batch that fits: when memory runs out, the batch is halved and the work goes on.

A smaller batch changes the rounding of later results, and nothing else. A worker keeps it, and reports it with every
task that it finishes from then on; a continued run begins with it. Only allocations of a pass through the model are
handled here, neither killed processes nor tiles that do not fit.

Axes: none.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch

from nntk_dist.errors import Unavailable, first_line
from nntk_dist.runtime.memory import is_out_of_memory
from pipeline.job.task import Outcome

Result = TypeVar("Result")
BATCHED = ("features", "calibration", "gram", "test")  # stages whose tasks pass examples through the model
NUMBER = "batch"  # the name under which a task reports its batch


@dataclass
class FittingBatch:
    """A batch size that never grows.

    Attributes:
        size: in examples.
        halved: whether it is smaller than it was planned.
    """

    size: int
    halved: bool = False

    def run(self, action: Callable[[int], Result]) -> Result:
        """Run an action with the present batch; while memory runs out, again from its beginning with half of it.

        Args:
            action: takes the batch size.

        Returns:
            What the action returns.

        Raises:
            Unavailable: a single example does not fit.
            Exception: the action raises it.
        """
        while True:
            try:
                return action(self.size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.size == 1:
                    raise Unavailable(
                        f"one example at a time does not fit into memory ({first_line(error)}); use fewer workers, "
                        "a smaller kernel.sketch, or a device with more memory"
                    ) from error
            # After the handler: the error's frames hold the tensors that did not fit.
            self.size, self.halved = max(1, self.size // 2), True
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def numbers(self) -> dict[str, float]:
        """Return what a task reports: nothing while the planned batch fits."""
        return {NUMBER: float(self.size)} if self.halved else {}


def remembered_batch(rows: Iterable[Outcome], planned: int) -> int:
    """Return the smallest batch that finished tasks have reported, or the planned one."""
    return min((int(row.numbers[NUMBER]) for row in rows if NUMBER in row.numbers), default=planned)
