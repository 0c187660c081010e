"""The runnable system: from a configuration to a plan, stages, a stored kernel and a report; and the command line.

Runs go serially or on Ray. The mathematics is in `nntk_dist`; this package distributes the work and keeps the results.
From Python, `run`, `run_groups` and `plan` do what the command line does; they are imported when they are first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.api import plan, run, run_groups

__all__ = ["plan", "run", "run_groups"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from pipeline import api

        return getattr(api, name)
    raise AttributeError(f"module 'pipeline' has no attribute '{name}'")
