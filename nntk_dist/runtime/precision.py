"""The precision of float32: full for evaluating and differentiating models, as chosen for the products of tiles.

On recent GPUs torch rounds the factors of convolutions to TF32, 10 bits, by default. Differences f(θ+z) − f(θ) at small
γ are smaller than that. Torch keeps such settings twice, as switches and as `fp32_precision` of each backend. The
context managers here set both, for the whole process, and restore them.

Axes: none.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

FULL = "highest"


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute in full float32 inside the context, with those algorithms of cuDNN that give the same bits again."""
    with _put_back():
        torch.set_float32_matmul_precision(FULL)
        torch.backends.cudnn.allow_tf32 = False
        for backend in _backends():
            backend.fp32_precision = "ieee"
        torch.backends.cudnn.deterministic = True
        yield


@contextmanager
def multiplying(precision: str) -> Iterator[None]:
    """Multiply float32 matrices inside the context at a precision of `torch.set_float32_matmul_precision`."""
    with _put_back():
        torch.set_float32_matmul_precision(precision)
        yield


def _backends() -> list[Any]:
    cuda, cudnn, mkldnn = (getattr(torch.backends, name) for name in ("cuda", "cudnn", "mkldnn"))
    return [cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]


@contextmanager
def _put_back() -> Iterator[None]:
    """Restore all settings at the end."""
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
    """Return a switch, or None if torch refuses to say, because the backends differ from it."""
    try:
        return read()
    except RuntimeError:
        return None
