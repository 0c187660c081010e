"""Findings about a model before its kernel is computed, as one value of plain numbers and words.

They are kept with the decision, and shown with a plan and on the report's page. Models without a kernel are refused
elsewhere (`nntk_dist.planning.decision`); here are the findings, and warnings of numbers that cannot be trusted.

Axes: n examples, c outputs.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from nntk_dist.errors import ModelError
from nntk_dist.models.evaluation import Evaluator
from nntk_dist.planning.effort import Effort
from nntk_dist.planning.jumps import JumpProbe
from nntk_dist.planning.noise_floor import NoiseFloor, probe_noise
from nntk_dist.sampling.draws import Drawing
from nntk_dist.spec import KernelSpec, Kind

# Noise of 1 % in differences adds 1e-4 of itself to the variance of `weight`, and to a covariance kernel's diagonal.
NOTABLE_NOISE = 0.01
# Relative to the largest output: more than rounding in any precision.
NOTABLE_CHANGE = 0.05


@dataclass(frozen=True)
class ModelProbes:
    """What was tried and found. Changes are relative to the largest output; None means not probed.

    repeat_change: largest change of an output between two equal calls; 0 for a deterministic model.
    batch_change: largest change of an output when its batch changes; None for a single example.
    jump_residual: share of the change of f along segments that the integrated gradient misses; None if not probed, and
        also if f did not change on them (then `jump_gradients`, the number of gradients taken, is not None).
    jump_size: of a jump met on long chords, relative to the output's range there; 0 if none was met.
    change_size, noise_size: root mean squares of the differences f(x; θ+z) − f(x; θ) and of their rounding noise.
    noise_measured: whether against float64; otherwise the noise is estimated from the rounding unit.
    training_modules: modules that would do something else in training mode; eval mode is what is used.
    cautions: sentences, one for every number that is not to be trusted.
    """

    repeat_change: float
    batch_change: float | None = None
    jump_residual: float | None = None
    jump_gradients: int | None = None
    jump_size: float | None = None
    change_size: float | None = None
    noise_size: float | None = None
    noise_measured: bool | None = None
    training_modules: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()

    @property
    def differentiable(self) -> bool | None:
        """Whether the gradient of f was found to account for its changes; None if not probed, or if nothing changed f.

        If it does not, f jumps (then `jump_size` is above 0), or its gradient is cut off, or replaced by another.
        """
        if self.jump_residual is None or self.jump_gradients is None:
            return None
        return JumpProbe(self.jump_residual, self.jump_gradients, self.jump_size or 0.0).differentiable

    @property
    def noise(self) -> float | None:
        """Noise over signal in differences of outputs: infinite without a signal, NaN without both."""
        if self.change_size is None or self.noise_size is None:
            return None
        return NoiseFloor(self.change_size, self.noise_size, bool(self.noise_measured)).ratio


def call_changes(evaluator: Evaluator, x: Tensor, values: Float[Tensor, "n c"]) -> tuple[float, float | None]:
    """Return how far outputs `values` of x change in a second call, and in other batches of the same rows.

    The batches: every other row in reverse order, either half, and three rows alone. A dependence on one outlying row,
    on neighbours, on the order or on the number of rows shows in one of them. Relative to the largest output.
    Cost: two and a half forward passes over x, in seven calls.

    Raises:
        ModelError: the model fails on one of these batches.
    """
    scale = float(values.abs().max())

    def change(others: Tensor, kept: Tensor) -> float:
        largest = float((others - kept).abs().max())
        return largest / scale if scale > 0 else (math.inf if largest > 0 else 0.0)

    repeat = change(evaluator.base(x), values)
    if len(x) == 1:
        return repeat, None
    changes: list[float] = []
    for rows in _other_batches(len(x)):
        try:
            others = evaluator.base(x[rows])
        except ModelError as error:
            if max(changes, default=0.0) > NOTABLE_CHANGE:
                break  # a dependence on the batch, which is the reason
            raise ModelError(f"with {len(rows)} of {len(x)} rows that it takes together, {error}") from error
        changes.append(change(others, values[rows]))
    return repeat, max(changes)


def _other_batches(count: int) -> list[list[int]]:
    """Rows of batches that show a dependence on other rows."""
    every, middle = list(range(count)), count // 2
    batches = [every[::-2], every[:middle], every[middle:], [0], [middle], [count - 1]]
    return [list(rows) for rows in dict.fromkeys(map(tuple, batches))]


def probe_model(
    evaluator: Evaluator,
    spec: KernelSpec,
    x: Tensor,
    drawing: Drawing | None,
    *,
    differences: bool,
    unmoved: Sequence[str],
    calls: tuple[float, float | None],
    jumps: JumpProbe | None,
) -> ModelProbes:
    """Collect what was found, and measure the noise floor.

    Noise in pre-activations moves an example as noise in its weights does; so weights are moved here for `activation`
    too.

    Args:
        evaluator: the model, evaluating perturbed models as the kernel's computation will.
        spec: the kernel.
        x: a few examples.
        drawing: the kernel's draws; None for the kind `local`, which has no noise floor. A kernel that takes gradients
            of a model of many parameters has none either.
        differences: whether the estimator takes differences of outputs; gradients have no such cancellation.
        unmoved: parameters that the estimator's draws leave alone.
        calls: what `call_changes` found.
        jumps: what `probe_jumps` found, if it was tried.

    Cost: at most 18 forward passes of up to 32 examples.
    """
    floor = None
    effort = Effort.of(evaluator.model)
    if drawing is not None and (differences or effort.measures_noise):
        columns = (spec.outputs,) if isinstance(spec.outputs, int) else range(evaluator.base(x[:1]).shape[1])
        floor = probe_noise(evaluator, drawing, x[: effort.examples_moved], columns, still=unmoved)
    notable = floor is not None and differences and floor.ratio > NOTABLE_NOISE
    return ModelProbes(
        repeat_change=calls[0],
        batch_change=calls[1],
        jump_residual=None if jumps is None or not math.isfinite(jumps.residual) else jumps.residual,
        jump_gradients=None if jumps is None else jumps.num_gradients,
        jump_size=None if jumps is None else jumps.jump,
        change_size=None if floor is None else floor.change,
        noise_size=None if floor is None else floor.noise,
        noise_measured=None if floor is None else floor.measured,
        training_modules=modules_by_mode(evaluator.model),
        cautions=(_noise_caution(floor, evaluator, spec, x, jumps),) if notable and floor is not None else (),
    )


def modules_by_mode(model: nn.Module) -> tuple[str, ...]:
    """Count torch's modules that behave differently in training mode, by class: `2 BatchNorm2d`, `1 Dropout`.

    A user's module that depends on `self.training` is not known here.
    """
    found = Counter(type(module).__name__ for module in model.modules() if _depends_on_mode(module))
    return tuple(f"{number} {name}" for name, number in found.items())


def _depends_on_mode(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.running_mean is not None
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return module.dropout > 0
    return isinstance(module, nn.RReLU)


def _noise_caution(
    floor: NoiseFloor, evaluator: Evaluator, spec: KernelSpec, x: Tensor, jumps: JumpProbe | None
) -> str:
    dtype = str(evaluator.base(x[:1]).dtype).removeprefix("torch.")
    remedies = ["a larger gamma"]
    if floor.measured:  # otherwise it is float64 already
        remedies.append("dtype float64")
        if spec.kind == Kind.NONLOCAL and jumps is None:
            remedies.append("estimator autodiff, if the model has no jumps")
    size = "all" if math.isinf(floor.ratio) else f"{floor.ratio:.2g}"
    return (
        f"rounding in {dtype} on {x.device.type} is {size} of the differences f(x; θ+z) − f(x; θ) at gamma "
        f"{spec.distribution.gamma:g} (harmless: up to {NOTABLE_NOISE}), and adds noise to the kernel; take "
        f"{' or '.join(remedies)}"
    )
