"""Decide by a short trial whether perturbed models go faster stacked in one call or one after the other.

Stacking spares small models the overhead of a call; in large ones that overhead is nothing, and stacked weights cost
arithmetic (a convolution with its own weights for every draw is a grouped one, several times slower). Where the border
lies depends on model, batch, device and threads. The answer changes rounding: it is remembered for the life of the
process and for any number of draws, so that the same kernel has the same bits, and a run keeps it in its manifest.
Nothing else is measured here.

Units: seconds, for one draw on one batch.
"""

import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import lru_cache
from weakref import ref

import torch
from torch import Tensor, nn

from nntk_dist.layers.low_rank_passes import find_low_rank_passes
from nntk_dist.models.black_box import holds_black_box
from nntk_dist.models.evaluation import Evaluator, StackingFailed, draws_at_once
from nntk_dist.models.noise import is_random
from nntk_dist.models.parameters import ParameterSpace
from nntk_dist.runtime.threads import torch_threads
from nntk_dist.sampling.designs import Design
from nntk_dist.sampling.draws import Drawing
from nntk_dist.sampling.laws import LowRank

_LONG_SECONDS = 5e-3  # a pass to which the overhead of a call, about 0.1 ms, is nothing
_WORTH = 0.8  # of the time in turn: below it stacking is taken, so that near ties always end the same way
_DRAWS, _BLOCKS = 32, 4
_ROUNDS = 3


@dataclass(frozen=True)
class StackingTrial:
    """The choice with its times; seconds are NaN if a way was not tried, and `why` says the reason."""

    stacked: bool
    seconds_in_turn: float = math.nan
    seconds_stacked: float = math.nan
    why: str = ""

    @property
    def text(self) -> str:
        """Say the choice in words, for plan and report."""
        chosen = "perturbed models are evaluated " + ("stacked" if self.stacked else "one after the other")
        if self.why:
            return f"{chosen}: {self.why}"
        return (
            f"{chosen}: {1e3 * self.seconds_stacked:.2g} ms for a draw and batch stacked, "
            f"{1e3 * self.seconds_in_turn:.2g} ms in turn"
        )


def try_stacking(
    model: nn.Module, space: ParameterSpace, x: Tensor, drawing: Drawing, *, threads: int | None = None
) -> StackingTrial:
    """Return the faster way for a prepared model on batches like x, measured now or remembered.

    Low-rank draws are stacked by sharing products (`nntk_dist.layers.low_rank_passes`) if the model allows it. Black
    boxes and models with noise are evaluated in turn, and so is what vmap cannot take (control flow that depends on
    data, writes in place).
    """
    if holds_black_box(model):
        return StackingTrial(False, why="a black box takes one set of parameters at a time")
    if is_random(model):
        return StackingTrial(False, why="noise is fixed for one random function after the other")
    drawing = _timed(drawing)
    setting = (space, tuple(x.shape), x.dtype, next(model.parameters()).dtype, drawing)
    with torch_threads(threads):
        known = _remembered(_function(model), repr((setting, x.device, torch.get_num_threads())))
        if not known:
            known.append(_measure(model, space, x, drawing))
        return _confirmed(known[0], model, space, x, drawing)


def _function(model: nn.Module) -> tuple[Hashable, ...]:
    """What identifies f but for its parameters: classes themselves, the code of forward passes, plain attributes.

    Two models may print alike and differ in them: a class that was defined again, in a notebook, say. Classes are held
    by weak references.
    """
    return tuple(
        (path, ref(type(module)), getattr(type(module).forward, "__code__", None), _plain_attributes(module))
        for path, module in model.named_modules()
    )


def _plain_attributes(module: nn.Module) -> tuple[tuple[str, str], ...]:
    kinds = (bool, int, float, str, tuple, type(None))
    own = vars(module).items()
    return tuple((name, repr(value)) for name, value in own if name[0] != "_" and isinstance(value, kinds))


def _confirmed(
    trial: StackingTrial, model: nn.Module, space: ParameterSpace, x: Tensor, drawing: Drawing
) -> StackingTrial:
    """The remembered trial if it holds for this model: attributes that are no plain values may make another function.

    Cost: one stacked pass of one group of draws, if stacking was chosen.
    """
    if not trial.stacked or isinstance(drawing.distribution, LowRank):
        return trial
    z = drawing.perturbations(range(drawing.group_size), dtype=next(model.parameters()).dtype, device=x.device)
    try:
        Evaluator(model, space, stacked=True).try_stacked(x, z)
    except StackingFailed as error:
        return StackingTrial(False, why=str(error))
    return trial


def _timed(drawing: Drawing) -> Drawing:
    """The draws to time in place of a run's draws; they do not depend on its number of draws, seed or groups.

    The search for `rtol` begins with fewer draws than the final kernel has, and must give the same bits as a run that
    begins with the final number. Orthonormal groups grow with the number of draws and cost the same both ways, so
    independent draws replace them.
    """
    design = Design.IID if drawing.design == Design.ORTHOGONAL else drawing.design
    return replace(drawing, design=design, num_draws=_DRAWS, num_blocks=_BLOCKS, seed=0)


@lru_cache(maxsize=256)
def _remembered(_function: tuple[Hashable, ...], _setting: str) -> list[StackingTrial]:
    """The list that holds the remembered trial of this function and setting, if there is one."""
    return []


def _measure(model: nn.Module, space: ParameterSpace, x: Tensor, drawing: Drawing) -> StackingTrial:
    """Both ways, drawing included, since a shared product draws less."""
    in_turn, stacked = (Evaluator(model, space, stacked=stack) for stack in (False, True))
    shared = find_low_rank_passes(stacked, drawing, x)
    unit = drawing.group_size

    def pass_with(evaluator: Evaluator, draws: range) -> None:
        if shared is not None and evaluator.stacked:
            shared.perturbed(x, draws)
            return
        z = drawing.perturbations(draws, dtype=next(model.parameters()).dtype, device=x.device)
        evaluator.perturbed(x, z)

    first = range(unit)
    seconds_in_turn = _seconds(lambda: pass_with(in_turn, first), x.device) / len(first)
    if seconds_in_turn > _LONG_SECONDS and shared is None:
        return StackingTrial(False, why=f"a pass takes {1e3 * seconds_in_turn:.2g} ms, far above a call's overhead")
    if shared is None:
        z = drawing.perturbations(first, dtype=next(model.parameters()).dtype, device=x.device)
        try:
            stacked.try_stacked(x, z)
        except StackingFailed as error:
            return StackingTrial(False, why=str(error))
    most = min(_DRAWS, draws_at_once(space.num_parameters if shared is None else shared.numbers_of_a_draw, x))
    several = range(max(unit, most // unit * unit))
    seconds_in_turn = _seconds(lambda: pass_with(in_turn, several), x.device) / len(several)
    seconds_stacked = _seconds(lambda: pass_with(stacked, several), x.device) / len(several)
    return StackingTrial(seconds_stacked < _WORTH * seconds_in_turn, seconds_in_turn, seconds_stacked)


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """The least time of a few rounds, one before them not counted."""
    best = math.inf
    for number in range(_ROUNDS + 1):
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number:
            best = min(best, time.perf_counter() - began)
    return best
