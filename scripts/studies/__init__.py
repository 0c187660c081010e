"""Studies of the estimators: what `scripts/estimators.py` measures, keeps and writes down; one module a question.

    cells       the parts of a study, computed one by one and kept in a JSON file
    agreement   estimators, designs and distributions against closed forms, quadrature and brute force
    coverage    how often intervals hold the truth
    cost        error against forward passes and seconds, on networks of 100,000 parameters
    reduction   the same draws with variance reduction and without
    accuracy    searches by rtol: do they hold, and at what price
    limits      small ranges, scales and high temperatures
    page        the page and its plots, from the JSON file alone

They use the oracles of `tests`, which share no code with the library.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from scripts.studies import accuracy, agreement, cost, coverage, limits, reduction
from scripts.studies.cells import Cell

# Sections of the page, in its order.
SECTIONS: Mapping[str, Callable[..., list[Cell]]] = MappingProxyType(
    {
        "agreement": agreement.cells,
        "coverage": coverage.cells,
        "cost": cost.cells,
        "reduction": reduction.cells,
        "accuracy": accuracy.cells,
        "limits": limits.cells,
    }
)
