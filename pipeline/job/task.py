"""A task and its outcome: what the driver and its workers send each other. Frozen, small and picklable.

Imports nothing: a worker that needs nothing else starts in a moment.

Units: `_bytes`; seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Task:
    """One unit of work of a stage; `tile` names it in the ledger, `arguments` are what earlier stages found out."""

    stage: str
    tile: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a finished task returns: small numbers only, the results themselves are in the store."""

    stage: str
    tile: str
    worker: str
    started: float
    seconds: float
    written_bytes: int
    checksum: int
    peak_bytes: int
    numbers: Mapping[str, float] = field(default_factory=dict)
