"""How much the probes of a model may cost: less for a model with many parameters.

A pass takes at least a multiply-add for each parameter and example, and a copy of the parameters in float64 eight bytes
for each. A random direction in the space of many parameters moves all units at once, so that a few directions show what
many show of a small model. Nothing is measured here: a model is always judged by the same numbers.

Axes: P parameters.
"""

from dataclasses import dataclass

from torch import nn

_PARAMETERS_OF_ALL = 1 << 28  # multiply-adds of a pass over the examples, at least
_MANY_PARAMETERS = 1 << 25
_FEWEST_EXAMPLES, _MOST_EXAMPLES = 4, 32


@dataclass(frozen=True)
class Effort:
    """What the probes of a model take.

    Attributes:
        examples: the examples on which it is tried.
        examples_moved: of these, the examples on which it is tried at other parameters.
        segments: short segments, along which the gradient is integrated; none if the long ones are to do.
        long_segments: longer ones.
        intervals: into which a segment is divided at first.
        sums: random sums of all outputs whose gradients are integrated in place of those of the outputs; None for the
            outputs themselves, which takes second derivatives.
        chords: long chords, on which jumps are searched.
        chord_intervals: into which a chord is divided at first.
        measures_noise: whether rounding of differences is measured also for a kernel that takes none.
    """

    examples: int = _MOST_EXAMPLES
    examples_moved: int = _MOST_EXAMPLES
    segments: int = 4
    long_segments: int = 2
    intervals: int = 16
    sums: int | None = None
    chords: int = 4
    chord_intervals: int = 16
    measures_noise: bool = True

    @classmethod
    def of(cls, model: nn.Module) -> "Effort":
        """Return the effort for a model, by its number of parameters, selected or not.

        Example:
            >>> Effort.of(nn.Linear(3, 2)) == Effort()
            True
        """
        size = max(1, sum(parameter.numel() for parameter in model.parameters()))
        examples = max(_FEWEST_EXAMPLES, min(_MOST_EXAMPLES, _PARAMETERS_OF_ALL // size))
        if size <= _MANY_PARAMETERS:
            return cls(examples, examples)
        return cls(
            examples,
            examples_moved=2,
            segments=0,
            long_segments=1,
            intervals=4,
            sums=1,
            chords=1,
            chord_intervals=8,
            measures_noise=False,
        )
