"""Collects the content of the report page from store, tables, ledger and manifest, and writes `report/index.html`.

It reads at most a 512 × 512 sample of the kernel, or computes it from features if no tiles are written. The package
`pipeline.report` makes the page.

Axes: n train rows, k rows of the thumbnail.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import yaml

from nntk_dist.analysis.regression.ridge_problem import RidgeRow
from nntk_dist.planning.decision import Decision
from nntk_dist.spec import GammaScale, Kind, Outputs, Statistic
from nntk_dist.weighting.options import Weighting
from pipeline.config.choices import StandardErrorChoice
from pipeline.decisions.stored_run import stored_decision, stored_job
from pipeline.records.manifest import Manifest
from pipeline.report import (
    KernelFacts,
    Provenance,
    RegressionFacts,
    ReportInputs,
    SolverFacts,
    StageTiming,
    StandardErrors,
    Thumbnail,
    render_report,
)
from pipeline.report.plots import PLOTS
from pipeline.storage.array_table import stored_factor_form
from pipeline.storage.factor import factor_rows
from pipeline.storage.kernel_arrays import KernelArrays
from pipeline.storage.run_storage import RunStorage
from pipeline.storage.tables import read_table

REPORT_PATH = "report/index.html"
_THUMBNAIL_ROWS = 512
_THUMBNAIL_PIECES = 8


def write_report(storage: RunStorage, manifest: Manifest) -> None:
    """Write the report page of a run whose stages are finished."""
    storage.write_bytes(REPORT_PATH, render_report(collect_inputs(storage, manifest)).encode())


def collect_inputs(storage: RunStorage, manifest: Manifest) -> ReportInputs:
    """Return everything on the page as plain values."""
    config, results, decision = manifest.config, manifest.results, stored_decision(manifest)
    store = KernelArrays(storage)
    kernel, tiles = config["kernel"], manifest.layout["write_tiles"]
    eigenvalues = _eigenvalues(storage, manifest)
    return ReportInputs(
        title=config["name"],
        data=config["data"]["source"],
        model=_model_text(config["model"]),
        kernel=_kernel_facts(manifest, decision),
        provenance=_provenance(manifest),
        gram=_thumbnail(store, manifest, full=kernel["outputs"] == Outputs.FULL),
        eigenvalues=eigenvalues,
        regression=_regression(storage, manifest),
        standard_errors=_standard_errors(store)
        if tiles and manifest.layout["stderr"] == StandardErrorChoice.ENTRY
        else None,
        stages=[
            StageTiming(
                stage=name,
                tasks=int(record.results["tasks"]),
                wall_seconds=record.seconds,
                busy_seconds=record.results["seconds"],
                written_bytes=int(record.results["bytes"]),
                peak_bytes=int(record.results["peak_bytes"]),
            )
            for name, record in manifest.stages.items()
            if record.results.get("tasks")
        ],
        plots=plot_names(config["report"]["plots"]),
        probes=decision.probes,
        spectrum_numbers=_spectrum_numbers(eigenvalues, results),
        spectrum_solver=_solver("spectrum", results),
        regression_solver=_solver("regression", results),
    )


def plot_names(plots: bool | Sequence[str]) -> tuple[str, ...]:
    """Return the names of the plots of a page: the given names, all registered plots for True, none for False.

    Raises:
        ArgumentError: a given plot does not exist.
    """
    if isinstance(plots, bool):
        return tuple(PLOTS) if plots else ()
    for name in plots:
        PLOTS.get(name)
    return tuple(plots)


def _model_text(model: dict[str, Any]) -> str:
    arguments = [f"{key} {' '.join(map(str, v)) if isinstance(v, list) else v}" for key, v in model["args"].items()]
    return ", ".join([model["builder"], *arguments])


def _kernel_facts(manifest: Manifest, decision: Decision) -> KernelFacts:
    kernel, sizes, results = manifest.config["kernel"], manifest.sizes, manifest.results
    kind = Kind(kernel["kind"])
    local = kind == Kind.LOCAL
    distribution = kernel["distribution"]
    return KernelFacts(
        kind=kind,
        estimator=decision.estimator,
        estimator_reason="; ".join(filter(None, (decision.explanation, decision.stacking))),
        statistic=Statistic(kernel["statistic"]),
        outputs=str(kernel["outputs"]),
        num_train=sizes["num_train"],
        num_test=sizes["num_test"],
        num_parameters=sizes["num_parameters"],
        num_draws=None if local else sizes["num_draws"],
        num_blocks=sizes["num_blocks"],
        distribution=None if local else _distribution_text(distribution),
        weighting=_weighting_text(kernel["weighting"], sizes["num_train"]),
        relative_error=results.get("train_relative_error"),
        relative_error_bound=results.get("train_relative_error_bound"),
        accuracy=results.get("rtol_verdict"),
        accuracy_reached=results.get("rtol_reached"),
        accuracy_caution=results.get("accuracy_caution"),
        interval_caution=results.get("interval_caution"),
        relative_bias=results.get("train_relative_bias"),
        unresolved_share=results.get("train_unresolved_share") or 0.0,
        matmul_precision=manifest.layout["matmul_precision"],
    )


def _distribution_text(distribution: Mapping[str, Any]) -> str:
    """The name, the options that were given, and the range γ."""
    given = {**distribution, **distribution["options"]}
    fixed = ("name", "gamma", "gamma_scale", "options")
    parts = [
        f"{option} = {value:g}" if isinstance(value, int | float) else f"{option} = {value}"
        for option, value in given.items()
        if option not in fixed and value is not None
    ]
    unit = " (relative per tensor)" if distribution.get("gamma_scale") == GammaScale.RELATIVE else ""
    return ", ".join([distribution["name"], *parts, f"γ = {distribution['gamma']:g}{unit}"])


def _weighting_text(section: Mapping[str, Any], num_train: int) -> str | None:
    """The weighting in words, with the size of its reference batch; None if it is fixed."""
    weighting = Weighting(**section)
    if weighting.is_fixed:
        return None
    count = min(section["reference"], num_train)
    return f"{weighting.text}{f'; {count} reference examples' if weighting.compares_outputs else ''}"


def _provenance(manifest: Manifest) -> Provenance:
    config = manifest.config
    run_dir = shlex.quote(str(config["run_dir"]))
    return Provenance(
        created=manifest.created.isoformat(timespec="seconds"),
        git_commit=manifest.git_commit,
        fingerprints=manifest.fingerprints,
        seeds=manifest.seeds,
        versions={name: version for name, version in manifest.versions.items() if version is not None},
        config_yaml=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        commands=(
            ("Save the configuration below as config.yaml and run it:", "nntk run config.yaml --set run_dir=again"),
            ("Check this run:", f"nntk verify {run_dir}"),
            ("Write this page again:", f"nntk report {run_dir}"),
        ),
    )


def _thumbnail(store: KernelArrays, manifest: Manifest, *, full: bool) -> Thumbnail | None:
    """At most 512 evenly spaced rows of the kernel (without tiles: eight runs of rows), sorted by label or target."""
    targets = store.read("train/targets")
    tiles = manifest.layout["write_tiles"]
    chosen = _evenly(len(targets), _THUMBNAIL_ROWS) if tiles else _runs(len(targets))
    kept = targets[chosen]
    classes = np.issubdtype(targets.dtype, np.integer)
    order = np.argsort(kept if classes else kept.reshape(len(kept), -1)[:, 0], kind="stable")
    sample = (
        _stored_entries(store, chosen, len(targets), full=full) if tiles else _made_entries(store, manifest, chosen)
    )
    values = sample[np.ix_(order, order)]
    if not classes:
        return Thumbnail(values, "ordered by target")
    labels, starts = np.unique(kept[order], return_index=True)
    return Thumbnail(values, "ordered by class", starts[1:].tolist(), [str(label) for label in labels])


def _evenly(total: int, count: int) -> np.ndarray:
    return np.unique(np.linspace(0, total - 1, min(count, total)).astype(int))


def _runs(total: int) -> np.ndarray:
    """Eight evenly spaced runs of 64 rows: features are read a shard at a time, so scattered rows would cost more."""
    length = _THUMBNAIL_ROWS // _THUMBNAIL_PIECES
    starts = _evenly(max(1, total - length + 1), _THUMBNAIL_PIECES)
    return np.unique(np.minimum(starts[:, None] + np.arange(length), total - 1))


def _stored_entries(store: KernelArrays, chosen: np.ndarray, num_examples: int, *, full: bool) -> np.ndarray:
    """The entries of all pairs of chosen examples; for a kernel of all outputs, of the first output."""
    gram = store.array("train/gram")
    rows = chosen * (gram.shape[0] // num_examples if full else 1)
    return np.asarray(gram.oindex[rows, rows])


def _made_entries(store: KernelArrays, manifest: Manifest, chosen: np.ndarray) -> np.ndarray:
    """The same entries from the factor, for a run without tiles."""
    factor = stored_factor_form(stored_job(manifest))
    assert factor is not None
    read = factor_rows(store, factor, "train").read
    breaks = np.flatnonzero(np.diff(chosen) > 1) + 1
    pieces = [read((int(run[0]), int(run[-1]) + 1)) for run in np.split(chosen, breaks)]
    rows = np.concatenate(pieces)[:: factor.rows_per_example]
    return rows @ rows.T


def _spectrum_numbers(
    eigenvalues: Mapping[str, np.ndarray], results: Mapping[str, Any]
) -> dict[str, Mapping[str, float]]:
    """Derived numbers of spectra with only some eigenvalues in the table; JSON keeps infinity as null."""
    if "spectrum_method" not in results:
        return {}
    found: dict[str, Mapping[str, float]] = {}
    for name in eigenvalues:
        prefix = f"spectrum_{name}_" if f"spectrum_{name}_trace" in results else "spectrum_plugin_"
        own = {key.removeprefix(prefix): value for key, value in results.items() if key.startswith(prefix)}
        found[name] = {key: math.inf if value is None else float(value) for key, value in own.items()}
    return found


def _solver(stage: Literal["spectrum", "regression"], results: Mapping[str, Any]) -> SolverFacts | None:
    method = results.get(f"{stage}_method")
    if method is None:
        return None
    columns, passes = results.get(f"{stage}_columns"), results.get(f"{stage}_passes")
    return SolverFacts(
        method=method,
        columns=None if columns is None else int(columns),
        passes=None if passes is None else int(passes),
        converged=results.get(f"{stage}_converged"),
    )


def _eigenvalues(storage: RunStorage, manifest: Manifest) -> dict[str, np.ndarray]:
    table = read_table(storage, "eigenvalues") or {}
    kernel = manifest.config["kernel"]
    first = kernel["kind"]
    if first == Kind.NONLOCAL:
        first = Statistic.PLUGIN if kernel["statistic"] == Statistic.BOTH else kernel["statistic"]
    names = {"eigenvalue": str(first), "eigenvalue_unbiased": str(Statistic.UNBIASED)}
    found = {names[column]: np.asarray(values) for column, values in table.items() if column in names}
    return {name: values[np.isfinite(values)] for name, values in found.items()}  # shorter ones end in NaN


def _regression(storage: RunStorage, manifest: Manifest) -> RegressionFacts | None:
    table = read_table(storage, "regression")
    if table is None:
        return None
    rows = [
        RidgeRow.from_numbers(dict(zip(table, values, strict=True))) for values in zip(*table.values(), strict=True)
    ]
    num_classes = manifest.sizes["num_classes"]
    return RegressionFacts(rows, num_classes)


def _standard_errors(store: KernelArrays) -> StandardErrors | None:
    """Summary over the first rows of the kernel, about a quarter of a million entries."""
    gram = store.array("train/gram")
    rows = gram.shape[0]
    stripe = slice(0, max(1, min(rows, _THUMBNAIL_ROWS**2 // rows)))
    values = store.read("train/gram_stderr", stripe)
    resolved = values[np.isfinite(values)]
    if not resolved.size:
        return None
    diagonal = store.read("train/gram", stripe)[np.arange(stripe.stop), np.arange(stripe.stop)]
    return StandardErrors(
        median=float(np.median(resolved)),
        percentile_90=float(np.quantile(resolved, 0.9)),
        largest=float(resolved.max()),
        mean_diagonal=float(diagonal.mean()),
        num_rows=None if stripe.stop == rows else stripe.stop,
    )
