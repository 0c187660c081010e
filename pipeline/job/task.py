"""A task and its outcome: what the driver and its workers send each other. Frozen, small and picklable.

Imports nothing: a worker that needs nothing else starts in a moment.

Units: `_bytes`; seconds.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

OF_GROUP = "|"  # between the name of a group of parameters and the name of a number of its own


@dataclass(frozen=True)
class Task:
    """One unit of work of a stage; `tile` names it in the ledger, `arguments` are what earlier stages found out."""

    stage: str
    tile: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished task returns and the ledger keeps: small numbers only, the results themselves are in the store.

    Attributes:
        stage: the stage's name.
        tile: the task within its stage, such as "train/3/5".
        worker: host and process that carried it out.
        started: Unix time in seconds.
        seconds: how long it took.
        bytes: uncompressed bytes written to the kernel store.
        checksum: crc32 of the checksums of all pieces.
        error: the task's estimated error, or None.
        peak_bytes: largest resident memory of the worker, measured.
        numbers: named sums over the task, for later stages to add up.
    """

    stage: str
    tile: str
    worker: str
    started: float
    seconds: float
    bytes: int
    checksum: int
    error: float | None
    peak_bytes: int
    numbers: Mapping[str, float] = field(default_factory=dict)


def split_by_group(outcome: Outcome, own: str, others: Collection[str]) -> dict[str, Outcome]:
    """Return what a task did for each group of parameters, as if it had been a task for that group alone.

    Args:
        outcome: of a task that computed features of several groups.
        own: the group of the job.
        others: its siblings.
    """
    share = outcome.seconds / (1 + len(others))
    alone = {key: value for key, value in outcome.numbers.items() if OF_GROUP not in key}
    parts = {own: replace(outcome, seconds=share, numbers=alone)}
    for name in others:
        prefix = f"{name}{OF_GROUP}"
        numbers = {k.removeprefix(prefix): v for k, v in outcome.numbers.items() if k.startswith(prefix)}
        size, checksum = int(numbers.pop("bytes")), int(numbers.pop("checksum"))
        parts[name] = replace(outcome, seconds=share, bytes=size, checksum=checksum, numbers=numbers)
    return parts
