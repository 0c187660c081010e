"""Jump probes that tests share: the same model, draws and examples are probed once per process.

A probe of a small model takes as long as its kernel, or several times as long if the model jumps. The result depends
only on the arguments, bit for bit. Tests of the probe itself call `nntk_dist.planning.jumps`, which is not replaced.
"""

import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

from torch import Tensor, nn

from nntk_dist.models.parameters import ParameterSpace
from nntk_dist.planning.jumps import JumpProbe
from nntk_dist.sampling.draws import Drawing

Probe = Callable[[nn.Module, ParameterSpace, Drawing, Tensor], JumpProbe]

# Code that does not change while tests run. A module that a test writes to a file may have the name of another one.
_FIXED = ("torch.nn.", "nntk_dist.", "tests.")


class _Pickler(pickle.Pickler):
    """Pickles tensors by their values, as torch's own format contains addresses."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        numbers = value.detach().cpu().numpy()
        return tuple, (
            (type(value).__name__, value.requires_grad, str(numbers.dtype), numbers.shape, numbers.tobytes()),
        )


def _contents(values: tuple[Any, ...]) -> bytes:
    """Everything that a model and other values hold."""
    written = io.BytesIO()
    _Pickler(written).dump(values)
    return written.getvalue()


def shared(probe: Probe) -> Probe:
    """Wrap the probe so that it runs once for each combination of model, parameters, law, seed and examples.

    Models that cannot be pickled (hooks, lambdas) or that contain code from a test file are probed each time. The
    number of draws and their design make no difference (`tests/library/planning/test_jumps.py` checks it).
    """
    known: dict[bytes, JumpProbe] = {}

    @wraps(probe)
    def once(model: nn.Module, space: ParameterSpace, drawing: Drawing, x: Tensor) -> JumpProbe:
        if not all(type(module).__module__.startswith(_FIXED) for module in model.modules()):
            return probe(model, space, drawing, x)
        try:
            key = _contents((model, space, replace(drawing, design="iid", num_draws=8, num_blocks=4), x))
        except (pickle.PicklingError, AttributeError, TypeError, RuntimeError):
            return probe(model, space, drawing, x)
        if key not in known:
            known[key] = probe(model, space, drawing, x)
        return known[key]

    return once
