"""A worker: one process that carries out tasks one by one and measures them.

The same class runs in the driver (serial) and inside a Ray actor. It returns small numbers; results go to the store.

Units: seconds, bytes.
"""

import os
import resource
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from pipeline.context import Context
from pipeline.data import Dataset
from pipeline.job import Job, Outcome, Task
from pipeline.stages import STAGES


@dataclass
class Worker:
    """Executes tasks of one job; see `Context` for the arguments."""

    job: Job
    dataset: Dataset
    state: Mapping[str, Tensor]
    context: Context = field(init=False)

    def __post_init__(self) -> None:
        self.context = Context(self.job, self.dataset, self.state)

    def execute(self, task: Task) -> Outcome:
        """Carry out a task with the threads that its stage may use, and say what it took."""
        stage = STAGES[task.stage]
        threads = (os.cpu_count() or 1) if stage.USES_ALL_THREADS else self.job.layout.threads
        started, clock, before = time.time(), time.perf_counter(), torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with threadpool_limits(threads, user_api="blas"):
                written = stage.execute(self.context, task)
        finally:
            torch.set_num_threads(before)
        return Outcome(
            stage=task.stage,
            tile=task.tile,
            worker=f"{socket.gethostname()}:{os.getpid()}",
            started=started,
            seconds=time.perf_counter() - clock,
            written_bytes=written.num_bytes,
            checksum=written.checksum,
            peak_bytes=peak_bytes(),
            numbers=written.numbers | {f"crc:{path}": float(value) for path, value in written.checksums.items()},
        )


def peak_bytes() -> int:
    """The largest resident set of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
