"""neural-tangents at work, in an environment of its own: the trace kernel of a ReLU network by structured derivatives.

    python neural_tangents_peer.py FOLDER THREADS

The network and the inputs are in FOLDER/problem.npz, the first kernel goes to FOLDER/kernel.npy. Every line on stdin
is one kernel, answered by `done`. It knows nothing of this project.
"""

import os
import sys
from pathlib import Path

import numpy as np


def main(folder: Path, threads: int) -> None:
    """Compile, then compute for as long as there are lines."""
    # XLA takes as many threads as there are processors to it, and reads this before its first use.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    import jax
    import neural_tangents as nt
    from neural_tangents import stax

    problem = np.load(folder / "problem.npz")
    count = sum(name.startswith("weight_") for name in problem)
    weights = [problem[f"weight_{index}"] for index in range(count)]
    layers = []
    parameters = []
    for index, weight in enumerate(weights):
        layers += [stax.Dense(len(weight), parameterization="standard"), *([stax.Relu()] if index < count - 1 else [])]
        parameters += [(weight.T, problem[f"bias_{index}"]), *([()] if index < count - 1 else [])]
    _, apply, _ = stax.serial(*layers)
    kernel = jax.jit(
        nt.empirical_ntk_fn(
            apply, trace_axes=(-1,), vmap_axes=0, implementation=nt.NtkImplementation.STRUCTURED_DERIVATIVES
        )
    )
    x = jax.numpy.asarray(problem["x"])
    scaled = jax.tree_util.tree_map(jax.numpy.asarray, parameters)
    # neural-tangents takes the mean over traced outputs, not their sum
    np.save(folder / "kernel.npy", np.asarray(kernel(x, None, scaled)) * len(weights[-1]))
    for _ in sys.stdin:
        kernel(x, None, scaled).block_until_ready()
        sys.stdout.write("done\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
