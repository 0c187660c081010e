"""The headline numbers of a run, collected from the ledger for the manifest and the top of the report.

It reads ledger rows and computes nothing that a task could have computed.
"""

import math
from collections.abc import Mapping
from typing import Any

from nntk_dist.analysis.regression.ridge_problem import RidgeRow
from nntk_dist.spec import useless_estimate
from nntk_dist.statistics.few_draws import interval_caution
from nntk_dist.statistics.required_draws import verdict
from pipeline.driver.draw_search import looks_of
from pipeline.job.job import Job
from pipeline.records.ledger import Ledger
from pipeline.storage.array_table import kernel_width
from pipeline.work.stages import stages_of


def collect_results(job: Job, ledger: Ledger) -> dict[str, Any]:
    """Return the results by name, without the numbers that this kind of kernel does not have."""
    results: dict[str, Any] = {
        "estimator": job.decision.estimator,
        "draws": job.sizes.num_draws,
        "blocks": job.sizes.num_blocks,
        "parameters": job.sizes.num_parameters,
        "train": job.sizes.num_train,
        "test": job.sizes.num_test,
    }
    for row in ledger.rows("calibration"):
        results[f"{row.tile}_relative_error_bound"] = row.numbers["bound"]
        results[f"{row.tile}_relative_error"] = row.numbers["relative_error"]
        results[f"{row.tile}_stderr_level"] = row.numbers["level"]
        if row.tile != "diagonal":
            results[f"{row.tile}_unresolved_share"] = row.numbers["unresolved_share"]  # of the sample
        if "bias" in row.numbers and row.tile != "diagonal":
            results[f"{row.tile}_relative_bias"] = row.numbers["bias"]
        if row.tile == "train":
            caution = useless_estimate(job.spec, row.numbers["relative_error"], job.sizes.num_draws)
            results |= {"accuracy_caution": caution} if caution else {}
            short = interval_caution(
                job.decision.estimator,
                job.sizes.num_draws,
                job.sizes.num_blocks,
                reduced=job.decision.plan.variance_reduced,
            )
            results |= {"interval_caution": short} if short else {}
    if looks := looks_of(ledger):
        assert job.spec.rtol is not None
        last, rtol = looks[-1], job.spec.rtol
        results |= {
            "rtol": rtol,
            "rtol_reached": last.reaches(rtol),
            "rtol_verdict": verdict(last, rtol=rtol, max_draws=job.spec.max_draws),
            # the pilot's estimates use more blocks than the kernel has
            "train_relative_error": last.relative_error,
            "train_relative_error_bound": last.bound,
        }
    for stage, prefix in (("gram", "train/gram"), ("test", "test/gram")):
        sums = ledger.sums(stage, f"{prefix}:")
        split = stage if stage == "test" else "train"
        num_entries = job.sizes.rows(split) * job.sizes.num_train * kernel_width(job) ** 2
        results |= _tile_results({name.split(":")[1]: total for name, total in sums.items()}, split, num_entries)
    for row in ledger.rows("spectrum"):
        numbers = {key: value for key, value in row.numbers.items() if not key.startswith("solver:")}
        results |= {f"spectrum_{key.replace(':', '_')}": value for key, value in numbers.items()}
        results |= _solver_results(job, "spectrum", row.numbers)
    for row in ledger.rows("regression"):
        numbers = {key: value for key, value in row.numbers.items() if not key.startswith("solver:")}
        results |= {key: value for key, value in numbers.items() if key != "selected"}
        cautions = RidgeRow.from_numbers(numbers).cautions
        results |= {"regression_cautions": list(cautions)} if cautions else {}
        results |= _solver_results(job, "regression", row.numbers)
    for added in stages_of(job.config.stages)[len(stages_of()) :]:
        for row in ledger.rows(added.name):
            results |= {f"{added.name}_{key}": value for key, value in row.numbers.items() if ":" not in key}
    return {key: _plain(value) for key, value in results.items()}


def _tile_results(sums: Mapping[str, float], split: str, num_entries: int) -> dict[str, float]:
    """The relative bias, from sums of squares over all tiles of an array, and how many entries are unresolved."""
    results = {}
    if sums.get("squared_unbiased", 0.0) > 0:
        results[f"{split}_relative_bias"] = math.sqrt(sums["squared_difference"] / sums["squared_unbiased"])
    if "squared_stderr" in sums:
        results[f"{split}_unresolved_entries"] = sums["unresolved"]
        results[f"{split}_unresolved_share"] = sums["unresolved"] / num_entries
    return results


def _solver_results(job: Job, stage: str, numbers: Mapping[str, float]) -> dict[str, Any]:
    """The numbers of a stage's solver, none for the dense one; `converged` is true if every iteration converged."""
    name = job.solvers[stage].name
    if name == "dense":
        return {}
    own = {key.removeprefix("solver:"): value for key, value in numbers.items() if key.startswith("solver:")}
    converged = [value for key, value in numbers.items() if key.endswith(":converged")]
    results: dict[str, Any] = {f"{stage}_{key}": value for key, value in own.items() if key != "converged"}
    results[f"{stage}_method"] = name
    return results | ({f"{stage}_converged": all(converged)} if converged else {})


def _plain(value: Any) -> Any:
    """The value, or None for NaN and infinity, which JSON lacks."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
