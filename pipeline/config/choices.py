"""The fixed choices of the section `compute`, as enums. Each member equals its text, which YAML and JSON hold."""

from enum import StrEnum


class ExecutorChoice(StrEnum):
    """How tasks are run: in processes of Ray, or one after the other in this process."""

    RAY = "ray"
    SERIAL = "serial"


class StandardErrorChoice(StrEnum):
    """Which entries get a standard error: all, a sample, or none."""

    ENTRY = "entry"
    SAMPLE = "sample"
    NONE = "none"
