"""Output of the command line: plans, results, status and findings as short tables. Nothing is computed here."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.table import Table

from nntk_dist.runtime.precision import FULL
from pipeline.driver.verify import Finding
from pipeline.job.job import Job
from pipeline.planning.plan import Plan
from pipeline.records.ledger import Ledger, StageTotals
from pipeline.records.lock import Heartbeat
from pipeline.records.manifest import Manifest
from pipeline.report.formatting import count, duration, number, size
from pipeline.report.probe_facts import probe_facts
from pipeline.work.stages import PILOT, stage_named, stages_of

_TABLES = MappingProxyType({"spectrum": "eigenvalues", "regression": "regression"})


def print_choice(out: Console, plan: Plan, *, searching: bool) -> None:
    """Print one line on what a run computes and with which estimator, then one line for each caution of the probes.

    Args:
        out: the console.
        plan: the plan.
        searching: whether the number of draws is not known yet.
    """
    sizes, decision, spec = plan.job.sizes, plan.job.decision, plan.job.spec
    draws = f"{count(sizes.num_draws)} draws"
    if searching:
        draws = f"{draws} or more (up to {count(spec.max_draws)}), as rtol {spec.rtol:g} requires"
    out.print(
        f"{plan.job.spec.kind} kernel, estimator {decision.estimator}: {decision.explanation}; "
        f"{count(sizes.num_train)} train and {count(sizes.num_test)} test rows, "
        f"{count(sizes.num_parameters)} parameters, {draws}, {plan.num_workers} worker(s)",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
    if decision.stacking:
        out.print(decision.stacking, soft_wrap=True, markup=False, highlight=False)
    for caution in () if decision.probes is None else decision.probes.cautions:
        _print_caution(out, caution)


def print_plan(out: Console, plan: Plan, *, searching: bool) -> None:
    """Print the whole plan; while the number of draws is not known yet, the plan for the smallest number."""
    print_choice(out, plan, searching=searching)
    projection, layout = plan.projection, plan.job.layout
    table = Table("stage", "tasks", "operations", "time (estimate)", box=None, pad_edge=False)
    for stage in stages_of(plan.job.config.stages):
        name = stage.name
        if projection.tasks[name]:
            seconds = projection.seconds.get(name, 0.0)
            operations = projection.operations.get(name, 0.0)
            table.add_row(name, count(projection.tasks[name]), f"{operations:.2g}", duration(seconds))
    out.print(table)
    out.print(
        f"time: about {duration(sum(projection.seconds.values()))} at this machine's speed, within a factor of three"
    )
    disk = ", ".join(f"{name} {size(amount)}" for name, amount in projection.disk_bytes.items())
    out.print(f"disk: {size(projection.total_disk_bytes)} before compression ({disk})", soft_wrap=True)
    out.print(
        f"memory: at most {size(projection.worker_bytes)} per worker, {size(plan.memory_per_worker)} allowed; "
        f"spectrum and regression {size(projection.solve_bytes)}",
        soft_wrap=True,
    )
    for name, solver in plan.job.solvers.items():
        out.print(f"{name}: {solver.text}", soft_wrap=True, markup=False, highlight=False)
    if not layout.write_tiles:
        asked = plan.job.config.compute.write_tiles is False
        reason = "as requested" if asked else "they do not fit on the disk"
        out.print(f"tiles: none are written, {reason}; later stages use the factor", soft_wrap=True)
    features = (
        "stored" if layout.store_features else f"recomputed for every tile, {layout.outputs_at_once} outputs at a time"
    )
    precision = layout.matmul_precision
    rounded = "" if precision == FULL else f", products of tiles at matmul_precision {precision}"
    out.print(
        f"layout: tile {layout.tile}, batch {layout.batch}, features {features}, {layout.threads} thread(s) a worker, "
        f"{layout.dtype} on {layout.device}{_sharing(plan.job)}{rounded}",
        soft_wrap=True,
    )
    probes = plan.job.decision.probes
    for fact in () if probes is None else probe_facts(probes):
        line = f"probe {fact.label[:1].lower()}{fact.label[1:]}: {fact.value}; {fact.verdict}"
        out.print(line, soft_wrap=True, markup=False, highlight=False)


def _print_caution(out: Console, caution: str) -> None:
    out.print("caution:", style="yellow", end=" ")
    out.print(caution, soft_wrap=True, markup=False, highlight=False)


def _sharing(job: Job) -> str:
    """How many workers share a GPU, as text to append; empty if none do."""
    share = job.config.compute.workers_per_gpu
    return f", {share} workers on each GPU" if share > 1 else ""


def print_results(out: Console, results: Mapping[str, Any], run_dir: str) -> None:
    """Print the headline numbers, and the paths of kernel and report."""
    lines = []
    if results.get("test_accuracy") is not None:
        lines.append(
            f"test accuracy {results['test_accuracy']:.4f} at ridge {results['ridge']:g} (leave-one-out choice)"
        )
    elif results.get("test_error") is not None:
        lines.append(f"test mean squared error {number(results['test_error'])} at ridge {results['ridge']:g}")
    if results.get("train_relative_error") is not None:
        which = "unbiased kernel" if "train_relative_bias" in results else "kernel"
        lines.append(f"estimated relative error of the {which}: {results['train_relative_error']:.3g}")
    if results.get("train_unresolved_share"):
        lines.append(
            f"unresolved: {100 * results['train_unresolved_share']:.2g} % of the entries; what they could hold is part "
            "of the bound of the error"
        )
    if results.get("rtol_verdict") is not None:
        lines.append(results["rtol_verdict"])
    for stage in ("spectrum", "regression"):
        if results.get(f"{stage}_converged") is False:
            lines.append(
                f"{stage} did not converge to its tolerance; tables/{_TABLES[stage]}.parquet has the residuals"
            )
    if results.get("train_relative_bias") is not None:
        lines.append(f"estimated bias of plugin, ‖plugin − unbiased‖/‖unbiased‖: {results['train_relative_bias']:.3g}")
    lines.append(f"kernel {run_dir}/kernel.zarr, report {run_dir}/report/index.html")
    for line in lines:
        out.print(line, soft_wrap=True, markup=False, highlight=False)
    single = [results[name] for name in ("accuracy_caution", "interval_caution") if name in results]
    for caution in (*single, *results.get("regression_cautions", ())):
        _print_caution(out, caution)


def print_status(out: Console, manifest: Manifest, job: Job, ledger: Ledger, heartbeat: Heartbeat | None) -> None:
    """Print the state of a run and one line for each stage; `heartbeat` is None if no driver is alive."""
    if manifest.completed is not None:
        state = "finished"
    elif heartbeat is not None:
        state = f"running (process {heartbeat.pid} on {heartbeat.host}, stage {heartbeat.stage})"
    else:
        state = "stopped; nntk run … --resume continues it"
    out.print(f"{manifest.config['name']}: {state}", markup=False, highlight=False, soft_wrap=True)
    table = Table("stage", "done", "tasks", "time in tasks", "written", box=None, pad_edge=False)
    totals = ledger.totals()
    for stage in (stage_named(PILOT, job), *stages_of(job.config.stages)):
        so_far = totals.get(stage.name, StageTotals())
        total = sum(1 for _ in stage.tasks(job)) or so_far.tasks
        if total:
            table.add_row(stage.name, count(so_far.tasks), count(total), duration(so_far.seconds), size(so_far.bytes))
    out.print(table)


def print_finding(out: Console, finding: Finding) -> None:
    """Print one check of `nntk verify`."""
    mark, style = ("ok", "green") if finding.passed else ("FAILED", "bold red")
    out.print(f"{finding.check}:", f"[{style}]{mark}[/]", end=" ")
    out.print(finding.detail, markup=False, highlight=False, soft_wrap=True)
