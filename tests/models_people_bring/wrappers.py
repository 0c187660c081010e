"""Models behind wrappers, and models that other tools made.

Axes: n examples.
"""

import torch
from torch import Tensor, nn

from nntk_dist.errors import ModelError
from tests.models_people_bring.case import Case, Computed, Given, Refused, numbers, of_module

EXAMPLE = torch.ones(1, 3, dtype=torch.float64)
TORCHSCRIPT = Refused(ModelError, r"TorchScript .*parameters cannot be replaced.*the Python module it was made from")


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def made_in_inference_mode() -> Given:
    with torch.inference_mode():
        return Given(small(), numbers(3))


def examples_of_inference_mode() -> Given:
    with torch.inference_mode():
        return Given(small(), numbers(3).clone())


def row(model: nn.Module, i: int) -> Tensor:
    return model(numbers(3)[i : i + 1])


def compiled() -> nn.Module:
    model = torch.compile(small(), backend="eager")
    assert isinstance(model, nn.Module)
    return model


def compiled_in_place() -> nn.Module:
    model = small()
    model.compile(backend="eager")
    return model


def with_hooks() -> nn.Module:
    model = small()
    model[0].register_forward_hook(lambda module, args, out: 2.0 * out)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1.0,))
    return model


class Inside(nn.Module):
    """A part of the model is something else."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.readout = part, nn.Linear(2, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.part(x))


class WithState(nn.Module):
    """A buffer that every call counts up, and cached values of the last call."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = small(), torch.zeros(0)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = h = self.body(x)
        return h


def called_before() -> nn.Module:
    model = WithState()
    model(EXAMPLE)
    return model


def trained() -> nn.Module:
    """Left in training mode, with gradients from the last step."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 2)).double().train()
    model(EXAMPLE).sum().backward()
    return model


CASES = (
    Case("DataParallel", of_module(lambda: nn.DataParallel(small()), 3)),
    Case("DataParallel inside", of_module(lambda: Inside(nn.DataParallel(small())), 3)),
    Case("torch.compile", of_module(compiled, 3), Computed(model=small)),
    Case("module.compile()", of_module(compiled_in_place, 3), Computed(model=small)),
    Case("TorchScript by script", of_module(lambda: torch.jit.script(small()), 3), TORCHSCRIPT),
    Case("TorchScript by trace", of_module(lambda: torch.jit.trace(small(), EXAMPLE), 3), TORCHSCRIPT),
    Case("TorchScript inside", of_module(lambda: Inside(torch.jit.script(small())), 3), TORCHSCRIPT),
    Case("torch.fx", of_module(lambda: torch.fx.symbolic_trace(small()), 3)),
    Case("made in inference mode", made_in_inference_mode, Computed(row, model=small)),
    Case("examples of inference mode", examples_of_inference_mode, Computed(row, model=small)),
    Case("hooks on modules", of_module(with_hooks, 3)),
    Case("a state that calls change", of_module(called_before, 3), Computed(model=WithState)),
    Case("left in training mode", of_module(trained, 3)),
)
