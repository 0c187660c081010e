"""The probes of a model in words: test, result, conclusion. The report page and `nntk plan` show them.

No number is computed here, and nothing is formatted as HTML.

Axes: none.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from nntk_dist.planning.jumps import JUMP_TOLERANCE
from nntk_dist.planning.model_probes import NOTABLE_NOISE, ModelProbes
from pipeline.report.formatting import number, percent

_NOT_PROBED = "not probed"


@dataclass(frozen=True)
class ProbeFact:
    """One probe: its name, its result, the verdict in a few words, and its meaning."""

    label: str
    value: str
    verdict: str
    meaning: str


def probe_facts(probes: ModelProbes) -> list[ProbeFact]:
    """Return all probes, including those that were not made."""
    return [*_call_facts(probes), _jump_fact(probes), _noise_fact(probes), _mode_fact(probes)]


def _call_facts(probes: ModelProbes) -> Iterator[ProbeFact]:
    repeat, batch = probes.repeat_change, probes.batch_change
    yield ProbeFact(
        "Same again",
        f"change {number(repeat)}",
        "deterministic" if repeat == 0 else "repeats to rounding, not to the bit",
        "Largest change of an output between two identical calls; models that draw random numbers are rejected.",
    )
    alone = batch is None
    yield ProbeFact(
        "Other batch",
        _NOT_PROBED if batch is None else f"change {number(batch)}",
        "a single example has no other batch" if alone else "independent of its batch, to rounding",
        "Largest change of an output when the rest of its batch changes; models that depend on it are rejected.",
    )


def _jump_fact(probes: ModelProbes) -> ProbeFact:
    value, verdict = _NOT_PROBED, "the choice of estimator does not depend on it"
    if probes.jump_gradients is not None:
        taken = f"up to {probes.jump_gradients} gradients a segment"
        value, verdict = f"no change of f; {taken}", "no gradient to trust"
        if probes.jump_residual is not None:
            bound = "" if probes.jump_residual <= JUMP_TOLERANCE else "at least "
            value = f"{bound}{percent(probes.jump_residual)} missed; {taken}"
            verdict = "locally Lipschitz: gradients may be used" if probes.differentiable else "gradients are wrong"
        if probes.jump_size:
            verdict = "jumps"
            value = f"{value}; a jump of {percent(probes.jump_size)} of the range"
    return ProbeFact(
        "Jumps in θ",
        value,
        verdict,
        "Share of the change of f along random segments that the integrated gradient misses, and jumps found along "
        "long chords. Gradients miss jumps; without a jump they are cut off, or replaced by others.",
    )


def _noise_fact(probes: ModelProbes) -> ProbeFact:
    noise = probes.noise
    if noise is None:
        value, verdict = _NOT_PROBED, "no perturbations, not finite, or the model does not run in float64"
    elif math.isnan(noise):
        value, verdict = "no change of f", "nothing to measure: none of the perturbations changed an output"
    else:
        value = "nothing but noise" if math.isinf(noise) else percent(noise)
        value += "" if probes.noise_measured else " (estimated)"
        if noise <= NOTABLE_NOISE:
            verdict = "differences stand above rounding"
        else:
            verdict = "too high for differences" if probes.cautions else "too high for differences; none are used"
    return ProbeFact(
        "Noise floor",
        value,
        verdict,
        "Rounding error of the differences f(x; θ+z) − f(x; θ), relative to their size; the reference is float64 at "
        "the same perturbations. It falls like 1/γ.",
    )


def _mode_fact(probes: ModelProbes) -> ProbeFact:
    held = ", ".join(probes.training_modules)
    return ProbeFact(
        "Training mode",
        held or "no module that is known to differ",
        "evaluated in eval mode" if held else "eval mode, the same as training mode",
        "Modules that behave differently in training (dropout, batch normalisation). The kernel belongs to eval mode: "
        "no dropout, running statistics.",
    )
