"""The local kernel against neural-tangents, in turns, on the same network, inputs and threads.

Peers have a separate environment, build/peers, because their versions of jax and numpy conflict with ours; the first
measurement creates it. They run in a separate process, which prints one line for each kernel. They compile before
anything is measured. A quick run has no peers.

Axes: n examples.
"""

import os
import subprocess
import tempfile
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nntk_dist import local_kernel, prepare_kernel
from nntk_dist.errors import NNTKError
from nntk_dist.runtime.threads import torch_threads
from scripts.benchmarks.figures import Figure, answer, best_seconds
from scripts.benchmarks.local import FULL, LOCAL, Effort, prepared, problem
from scripts.studies.cells import Answer, Cell

ROOT = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = ROOT / "build" / "peers"
REQUIREMENTS = ("neural-tangents==0.6.5", "jax==0.4.23", "jaxlib==0.4.23", "numpy==1.26.4", "scipy==1.12.0",
                "ml_dtypes==0.5.4")  # fmt: skip
EXAMPLES = (64, 256, 512)
LEAST = {64: 1.0, 256: 2.0, 512: 1.0}  # of the peer's seconds over those of `prepare_kernel`
_PROGRAM = Path(__file__).with_name("neural_tangents_peer.py")


def cells(*, quick: bool) -> list[Cell]:
    """Kernels of several sizes on one thread and on two; none if it has to be quick."""
    if quick:
        return []
    return [
        Cell(f"n = {n}, {threads} threads", {"n": n, "threads": threads, "effort": vars(FULL)}, _question(n, threads))
        for threads in (1, 2)
        for n in EXAMPLES
    ]


def _question(n: int, threads: int):  # type: ignore[no-untyped-def]
    def compute() -> Answer:
        with torch_threads(threads), on_processors(threads):
            return compare(FULL, n, threads, (str(peer_python()), str(_PROGRAM)))

    return compute


def peer_python() -> Path:
    """The interpreter of the peers' environment, which is made if there is none.

    Raises: NNTKError if it cannot be made.
    """
    python = ENVIRONMENT / "bin" / "python"
    done = ENVIRONMENT / "complete"
    if done.exists():
        return python
    venv.create(ENVIRONMENT, with_pip=True, clear=True)
    result = subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise NNTKError(
            f"the peers ({REQUIREMENTS[0]}, {REQUIREMENTS[1]}) cannot be installed into {ENVIRONMENT} "
            f"({(result.stderr.strip().splitlines() or ['no reason given'])[-1]}); see to the network, or measure the "
            "other sections by --only"
        )
    done.touch()
    return python


def compare(effort: Effort, n: int, threads: int, command: Sequence[str]) -> Answer:
    """Compare seconds of the peer's kernel with ours: its products alone, `prepare_kernel`, and a whole call.

    Both kernels must agree.
    """
    model, x = problem(effort, n)
    _, ours = prepared(model, x, LOCAL)
    public = prepare_kernel(model, x, kind="local")
    with tempfile.TemporaryDirectory() as folder, running(command, model, x, threads, Path(folder)) as peer:
        peer.ask()
        distance = float((ours() - peer.kernel()).norm() / ours().norm())
        if distance > 1e-4:
            raise NNTKError(f"the peer's kernel differs from ours by {distance:.2g}; allowed: 1e-4, or it is another")
        actions = {"neural-tangents": peer.ask, "products": ours, "prepare_kernel": lambda: public(x),
                   "whole call": lambda: local_kernel(model, x)}  # fmt: skip
        seconds = best_seconds(actions, rounds=2 * effort.rounds)
    details = {"relative difference": distance} | {f"seconds {name}": value for name, value in seconds.items()}
    theirs, where = seconds["neural-tangents"], f"n = {n}, {threads} threads"
    name = "neural-tangents, structured derivatives, compiled"
    return answer(
        Figure(f"{name} / prepare_kernel, {where}", theirs / seconds["prepare_kernel"], LEAST.get(n), details=details),
        Figure(f"{name} / products alone, {where}", theirs / seconds["products"]),
        Figure(f"{name} / whole call, {where}", theirs / seconds["whole call"]),
    )


@contextmanager
def on_processors(count: int) -> Iterator[None]:
    """Bind this thread, and the processes that it starts, to `count` processors.

    The peer is bound to as many processors as it has threads; without the same limit, only the peer could not move away
    from busy processors.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Peer:
    """A process that computes the kernel once for every line that it is sent."""

    def __init__(self, process: "subprocess.Popen[str]", folder: Path) -> None:
        self._process, self._folder = process, folder

    def ask(self) -> None:
        """One kernel, from start to end. Raises: NNTKError if the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write("again\n")
            self._process.stdin.flush()
        if self._process.stdout.readline() != "done\n":
            last = (self._folder / "log").read_text().strip()[-300:]
            raise NNTKError(f"the peer has ended: {last}; remove {ENVIRONMENT} to have it made again")

    def kernel(self) -> Tensor:
        """The kernel that it computed first."""
        return torch.from_numpy(np.load(self._folder / "kernel.npy")).double()


@contextmanager
def running(command: Sequence[str], model: nn.Module, x: Tensor, threads: int, folder: Path) -> Iterator[Peer]:
    """The peer on this network and these inputs, handed over in a file; it ends with the block."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    arrays: dict[str, Any] = {f"weight_{index}": layer.weight.numpy() for index, layer in enumerate(layers)}
    arrays |= {f"bias_{index}": layer.bias.numpy() for index, layer in enumerate(layers)}
    np.savez(folder / "problem.npz", x=x.numpy(), **arrays)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, str(folder), str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            yield Peer(process, folder)
        finally:
            process.kill()
            process.communicate()
