"""What more workers give, and what the driver costs: two workers against one, scheduling, a simulated cluster.

workers    features and Gram tiles of a real job, by one and by two workers of one thread, through the real executor,
           stage runner and ledger
           ("plain processes" in the details is the same ratio without any of this: what the machine gave just before)
overhead   tiles that keep a core busy for a known time: how much of the workers' time goes by between them
cluster    nodes of one CPU, simulated on this machine (real Ray nodes, with a process for each part of each), and a
           stage of tiles that compute nothing and say as much as a real one: tiles a second, and the driver's memory

If nothing is computed, workers import nothing of the pipeline: this machine could not hold them otherwise.

Units: seconds, MB. `load` is the machine's load average before a measurement: what else it was busy with.
"""

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import ray
from ray.cluster_utils import Cluster

from pipeline.config.schema import config_from_dict
from pipeline.driver.progress import SilentProgress
from pipeline.driver.run import prepare, state_of
from pipeline.driver.stage_runner import StageRunner
from pipeline.executors.on_ray import RayExecutor, connect
from pipeline.job.task import Outcome, Task
from pipeline.records.ledger import Ledger
from pipeline.records.lock import RunLock
from pipeline.storage.kernel_arrays import KernelArrays
from pipeline.storage.run_storage import RunStorage
from pipeline.work.stages import stage_named
from pipeline.work.worker import Worker
from scripts.benchmarks.figures import Figure, answer, best_seconds
from scripts.studies.cells import Answer, Cell

_STORE_BYTES = 80 << 20  # of a simulated node: about the least that Ray takes
_SAMPLES = (0.1, 0.5, 1.0)


def cells(*, quick: bool) -> list[Cell]:
    """The cells of the section."""
    work = {"train": 300, "tile": 150, "draws": 64, "rounds": 1} if quick else _WORK
    tiles = {"a second": (1.0, 4 if quick else 60), "10 ms": (0.01, 100 if quick else 4000)}
    cluster = {"num_nodes": 2, "num_tiles": 3000} if quick else {"num_nodes": 64, "num_tiles": 1_000_000}
    return [
        Cell("workers", work, lambda: _two_workers(**work, machine_seconds=0.2 if quick else 2.0)),
        *(
            Cell(
                f"overhead, tiles of {name}",
                {"seconds": seconds, "num_tiles": count},
                partial(_overhead, name, seconds, count),
            )
            for name, (seconds, count) in tiles.items()
        ),
        Cell("cluster", cluster, lambda: _cluster(**cluster)),
    ]


_WORK = {"train": 16384, "tile": 1024, "draws": 512, "rounds": 3}


def _two_workers(*, train: int, tile: int, draws: int, rounds: int, machine_seconds: float) -> Answer:
    """The rate of two workers over twice the rate of one, measured alternately."""
    load, machine = os.getloadavg()[0], _plain_processes(machine_seconds)
    with tempfile.TemporaryDirectory() as folder, _ray_here(num_cpus=3):
        config = config_from_dict(
            {
                "name": "scaling",
                "run_dir": f"{folder}/run",
                "data": {"source": "synthetic:sine", "train": train, "test": 64},
                "model": {"builder": "mlp", "args": {"widths": [256, 256]}},
                "kernel": {"estimator": "weight", "draws": draws},
                "compute": {"tile": tile, "workers": 1},
            }
        )
        prepared = prepare(config, resume=False)
        job = prepared.plan.job
        KernelArrays(prepared.storage).create(prepared.plan.arrays, {})
        ledger, lock = Ledger(prepared.storage), RunLock(prepared.storage)
        arguments = (Worker, job, prepared.dataset, state_of(prepared.model))
        executors = {name: RayExecutor(*arguments, num_workers=count) for name, count in (("one", 1), ("two", 2))}
        runners = {name: StageRunner(ledger, each, SilentProgress(), lock) for name, each in executors.items()}
        figures = []
        for stage in (stage_named(name, job) for name in ("features", "metric", "calibration", "gram")):
            if stage.name not in ("features", "gram"):
                runners["two"].run(stage, job, None)
                continue

            def carry_out(runner: StageRunner, stage: Any = stage) -> None:
                ledger.forget(stage.name)
                runner.run(stage, job, None)

            best = best_seconds({name: partial(carry_out, runner) for name, runner in runners.items()}, rounds=rounds)
            figures.append(
                Figure(
                    f"two workers of one thread over twice one, {stage.name}",
                    best["one"] / (2 * best["two"]),
                    least=0.9,
                    details={"tiles": len(ledger.done(stage.name)), "load": load, "plain processes": machine}
                    | {f"{name} worker(s), seconds": seconds for name, seconds in best.items()},
                )
            )
        for each in executors.values():
            each.close()
    return answer(*figures)


def _plain_processes(seconds: float) -> float:
    """The scaling of this machine without Ray: the rate of two single-threaded processes over twice the rate of one."""
    program = f"""
import time, torch
torch.set_num_threads(1)
a, done, began = torch.randn(700, 700), 0, time.perf_counter()
while time.perf_counter() - began < {seconds}:
    a @ a
    done += 1
print(done)
"""

    def products(count: int) -> int:
        started = [
            subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(count)
        ]
        return sum(int(process.communicate()[0]) for process in started)

    one = products(1)
    return products(2) / (2 * one)


def _overhead(name: str, seconds: float, num_tiles: int) -> Answer:
    """The share of two workers' time in which they were between tiles, from their first tile to the end."""
    load = os.getloadavg()[0]
    with _ray_here(num_cpus=2):
        executor = RayExecutor(_light_worker(), seconds, num_workers=2)
        for _ in executor.run(_tasks(8)):
            pass  # both have started
        spent, began = 0.0, time.perf_counter()
        for outcomes in executor.run(_tasks(num_tiles)):
            spent += sum(outcome.seconds for outcome in outcomes)
        wall = time.perf_counter() - began
        executor.close()
    most = 0.03 if seconds >= 1 else None
    details = {"tiles": num_tiles, "wall seconds": wall, "seconds in tiles": spent, "load": load}
    return answer(
        Figure(f"scheduling overhead, tiles of {name}, two workers", 1 - spent / (2 * wall), None, most, details)
    )


def _cluster(*, num_nodes: int, num_tiles: int) -> Answer:
    """Tiles a second, and the driver's memory on the way."""
    load, memory = os.getloadavg()[0], psutil.virtual_memory().available
    with tempfile.TemporaryDirectory() as folder, _simulated_cluster(num_nodes) as address:
        taken = (memory - psutil.virtual_memory().available) / 1e6
        storage = RunStorage(folder)
        executor = RayExecutor(_light_worker(), 0.0, num_workers=num_nodes, address=address)
        for _ in executor.run(_tasks(2 * num_nodes)):
            pass  # all have started
        edge = math.isqrt(2 * num_tiles)  # tiles i ≤ j, about as many
        stage: Any = SimpleNamespace(name="gram", uses_all_threads=False, tasks=lambda job: _tasks(num_tiles, edge))
        progress = _Sampling()
        runner = StageRunner(Ledger(storage), executor, progress, RunLock(storage))
        began = time.perf_counter()
        record = runner.run(stage, cast(Any, None), None)
        wall = time.perf_counter() - began
        executor.close()
        assert record.results["tasks"] == num_tiles
        size = sum(path.stat().st_size for path in Path(folder, "ledger").iterdir()) / 1e6
        details = {"nodes": num_nodes, "tiles": num_tiles, "seconds": wall, "load": load, "cluster, MB": taken}
        details["ledger, MB"], details["ledger files"] = size, len(list(Path(folder, "ledger").iterdir()))
    first, last = progress.samples[_SAMPLES[0]], progress.samples[_SAMPLES[-1]]
    return answer(
        Figure("tiles a second, dispatched, done and in the ledger", num_tiles / wall, least=500, details=details),
        Figure(
            "the driver's own memory (USS) at the end over that at a tenth",
            last["USS"] / first["USS"],
            most=1.1,
            details={
                f"{kind} at {share:.0%}, MB": amount
                for share, sample in progress.samples.items()
                for kind, amount in sample.items()
            },
        ),
    )


def _tasks(count: int, edge: int | None = None) -> Iterator[Task]:
    """`count` tiles i ≤ j of a matrix of `edge` tiles (by default as many as it takes), row by row."""
    edge = edge or count
    done = 0
    for i in range(2 * edge):
        for j in range(i, max(edge, i + 1)):
            if done == count:
                return
            yield Task("gram", f"train/{i}/{j}", {"level": 0.75})
            done += 1


def _light_worker() -> Callable[..., Any]:
    """A worker that keeps a core busy for some seconds and says as much as a Gram tile with standard errors would.

    Defined inside this function so that it is pickled by value: the worker imports nothing else of this module.
    """

    class LightWorker:
        def __init__(self, seconds: float, _threads: object) -> None:
            self._seconds = seconds

        def execute(self, task: Task) -> Outcome:
            began = time.perf_counter()
            i, j = map(int, task.tile.split("/")[1:])
            numbers = {f"train/gram:{name}": i + j / 7 for name in ("squared_unbiased", "squared_stderr", "unresolved")}
            for name in ("gram", "gram_unbiased", "gram_stderr"):
                numbers |= {f"crc32c:train/{name}@{i * 1024},{j * 1024}": float(i * j)}
                numbers |= {f"crc32c:train/{name}@{j * 1024},{i * 1024}": float(i + j)}
            while time.perf_counter() - began < self._seconds:
                pass
            seconds = time.perf_counter() - began
            return Outcome("gram", task.tile, "node:1", time.time(), seconds, 24 << 20, i ^ j, None, 1 << 30, numbers)

    return LightWorker


@contextmanager
def _ray_here(num_cpus: int) -> Iterator[None]:
    """Ray on this machine, with a CPU for each worker."""
    connected = connect(None, num_cpus)
    try:
        yield
    finally:
        if connected:
            ray.shutdown()


@contextmanager
def _simulated_cluster(num_nodes: int) -> Iterator[str]:
    """The address of a cluster of nodes of one CPU, beside a head that has none."""
    small: Mapping[str, Any] = {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    try:
        for _ in range(num_nodes):
            cluster.add_node(num_cpus=1, **small)
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


@dataclass
class _Sampling(SilentProgress):
    """A progress that shows nothing, and measures this process's memory at some points of the way."""

    samples: dict[float, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Any]:
        """See `pipeline.driver.progress.Progress`."""

        def advance(n: int = 1) -> None:
            nonlocal done
            done += n
            for share in _SAMPLES:
                if share not in self.samples and done >= share * total:
                    found = psutil.Process().memory_full_info()
                    self.samples[share] = {"USS": found.uss / 1e6, "RSS": found.rss / 1e6}

        yield SimpleNamespace(advance=advance)
