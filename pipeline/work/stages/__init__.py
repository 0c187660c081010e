"""The stages of a run, in their order. Each is a module with `tasks(job)` and `execute(context, task)`; none knows
another. The pilot comes before them, where there is one.

Axes: none.
"""

from types import MappingProxyType, ModuleType

from pipeline.work.stages import calibration, features, gram, metric, pilot, regression, spectrum, test

ORDER: tuple[ModuleType, ...] = (features, metric, calibration, gram, test, spectrum, regression)
STAGES = MappingProxyType({stage.NAME: stage for stage in (pilot, *ORDER)})
