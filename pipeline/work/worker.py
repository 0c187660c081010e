"""A worker: one process that carries out tasks and measures them.

The same class runs in the driver (serial) and inside a Ray actor. It returns small numbers; results go to the store.
Two threads may give it one task each: it computes one of them while it writes the results of the other.

Units: seconds, bytes.
"""

import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from threadpoolctl import ThreadpoolController
from torch import Tensor

from nntk_dist.errors import ArgumentError, first_line
from nntk_dist.runtime.memory import is_out_of_memory
from nntk_dist.runtime.precision import full_precision
from nntk_dist.runtime.threads import torch_threads
from pipeline.data import Dataset
from pipeline.job.job import Job
from pipeline.job.task import OF_GROUP, Outcome, Task
from pipeline.runtime.allocator import keep_freed_memory
from pipeline.runtime.cpus import Threads
from pipeline.work.context import Context, Written
from pipeline.work.stages import stage_named


@dataclass
class Worker:
    """Executes the tasks of one job; see `Context` for the arguments other than `threads`."""

    job: Job
    dataset: Dataset
    state: Mapping[str, Tensor]
    threads: Threads
    context: Context = field(init=False)
    _turn: threading.Lock = field(init=False, default_factory=threading.Lock)
    _pools: tuple[str, ThreadpoolController] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        keep_freed_memory()
        self.context = Context(self.job, self.dataset, self.state)

    def execute(self, task: Task) -> Outcome:
        """Carry out a task with the threads that its stage may use, and say what it took, not counting the wait for
        another that computes.

        Raises:
            ArgumentError: memory runs out.
            Exception: the stage raises it.
        """
        stage = stage_named(task.stage, self.job)
        with _memory_told(task), self._turn:
            started, clock = time.time(), time.perf_counter()
            if stage.uses_all_threads:  # of the whole kernel, which needs the memory itself
                self.context.forget()
            threads = self.threads.whole_node if stage.uses_all_threads else self.threads.own
            with self._limited(task.stage, threads), full_precision():
                written = stage.execute(self.context, task)
        with _memory_told(task):
            self.context.finish(written)
        return Outcome(
            stage=task.stage,
            tile=task.tile,
            worker=f"{socket.gethostname()}:{os.getpid()}",
            started=started,
            seconds=time.perf_counter() - clock,
            bytes=written.num_bytes,
            checksum=written.checksum,
            error=written.numbers.get("relative_error"),
            peak_bytes=peak_bytes(),
            numbers=self._numbers(written)
            | {
                f"{name}{OF_GROUP}{key}": value
                for name, own in written.beside.items()
                for key, value in (
                    self._numbers(own) | {"bytes": float(own.num_bytes), "checksum": float(own.checksum)}
                ).items()
            },
        )

    def _numbers(self, written: Written) -> dict[str, float]:
        """The numbers for the ledger."""
        checksums = {f"crc32c:{path}": float(value) for path, value in written.checksums.items()}
        return written.numbers | self.context.fitting.numbers() | checksums

    @contextmanager
    def _limited(self, stage: str, num_threads: int) -> Iterator[None]:
        """Limit torch, BLAS and OpenMP to `num_threads` inside the block; restore their numbers at its end."""
        if self._pools is None or self._pools[0] != stage:
            # Looking for loaded libraries takes milliseconds: once for a stage, since one may load another.
            self._pools = stage, ThreadpoolController()
        # torch first: it also sets MKL, whose count only torch can restore
        with torch_threads(num_threads), self._pools[1].limit(limits=num_threads):
            yield


@contextmanager
def _memory_told(task: Task) -> Iterator[None]:
    """Turn memory that runs out, if no smaller batch helps, into an ArgumentError that names the task."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ArgumentError(
            f"{task.stage} {task.tile} does not fit into memory ({first_line(error)}); use fewer workers, a smaller "
            "compute.tile or kernel.sketch, or a device with more memory, then continue with --resume"
        ) from error


def peak_bytes() -> int:
    """The largest resident set of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
