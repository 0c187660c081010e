"""The precision of float32: models are evaluated and differentiated in it as it is, tiles may be multiplied coarser.

On recent GPUs torch lets convolutions round their factors to TF32, 10 bits, unless told otherwise. Differences
f(θ+z) − f(θ) at small γ are smaller than that. Torch keeps such settings twice, as switches and as `fp32_precision` of
every backend: what is set here is set in both, for the whole process, and what was there before comes back.

Axes: none.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

FULL = "highest"


@contextmanager
def full_precision() -> Iterator[None]:
    """Nothing coarser than float32 meanwhile, and of cuDNN's algorithms those that give the same bits again."""
    with _put_back():
        torch.set_float32_matmul_precision(FULL)
        torch.backends.cudnn.allow_tf32 = False
        for backend in _backends():
            backend.fp32_precision = "ieee"
        torch.backends.cudnn.deterministic = True
        yield


@contextmanager
def multiplying(precision: str) -> Iterator[None]:
    """Float32 products at a precision of `torch.set_float32_matmul_precision` meanwhile."""
    with _put_back():
        torch.set_float32_matmul_precision(precision)
        yield


def _backends() -> list[Any]:
    cuda, cudnn, mkldnn = (getattr(torch.backends, name) for name in ("cuda", "cudnn", "mkldnn"))
    return [cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]


@contextmanager
def _put_back() -> Iterator[None]:
    """All settings as they are now, when it is over."""
    cudnn, backends = torch.backends.cudnn, _backends()
    multiplied, convolved = _known(torch.get_float32_matmul_precision), _known(lambda: cudnn.allow_tf32)
    deterministic, precisions = cudnn.deterministic, [backend.fp32_precision for backend in backends]
    try:
        yield
    finally:
        cudnn.deterministic = deterministic
        if multiplied is not None:
            torch.set_float32_matmul_precision(multiplied)
        if convolved is not None:
            cudnn.allow_tf32 = convolved
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision


def _known(read: Callable[[], Any]) -> Any:
    """A switch, or None where torch does not say, since the backends differ from it."""
    try:
        return read()
    except RuntimeError:
        return None
