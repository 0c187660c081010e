"""Warnings that point at the user's line, however deep in the library they arise."""

import inspect
import warnings

from nntk_dist.errors import NNTKWarning

_OWN = ("nntk_dist.", "contextlib.", "torch.utils._contextlib.")


def warn_caller(message: str) -> None:
    """Warn with an `NNTKWarning` that names the nearest line outside this library."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and f"{frame.f_globals.get('__name__', '')}.".startswith(_OWN):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, NNTKWarning, stacklevel=level if frame is not None else 2)
