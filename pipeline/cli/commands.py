"""The command line `nntk`, the same as `python -m pipeline`: run, plan, status, verify, report.

A wrong configuration, path or store ends with one line on standard error and exit code 2; Ctrl-C with the command that
continues the run and exit code 130. Any other exception is a bug and keeps its traceback.

Nothing heavy is imported before a command runs, so that `--help`, `--version` and completion answer at once.
"""

import logging
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.config.schema import Config
    from pipeline.records.manifest import Manifest
    from pipeline.storage.run_storage import RunStorage

_DISTRIBUTION = "nntk-dist"

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compute, store and analyse nonlocal neural tangent kernels of whole data sets.",
    epilog="Example: nntk run configs/digits.yaml",
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; see configs/.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=v", help="Override a configuration key.")]
Address = Annotated[
    str | None,
    typer.Option(envvar="RAY_ADDRESS", help="A Ray cluster; without it Ray is started on this machine."),
]
RunDir = Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")]


def _print_version(asked: bool) -> None:
    if not asked:
        return
    try:
        number = metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:  # run from a source tree
        number = "(not installed)"
    typer.echo(f"nntk {number}")
    raise typer.Exit()


@app.callback()
def nntk(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Compute, store and analyse nonlocal neural tangent kernels of whole data sets."""


@app.command(epilog="Example: nntk run configs/digits.yaml --set kernel.distribution.gamma=0.1 --resume")
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a stopped run, or redo changed stages.")] = False,
    address: Address = None,
) -> None:
    """Run all stages of CONFIG.

    The exit code is 0 if every stage finished, 3 if a requested accuracy was not reached.
    """
    from pipeline.config.schema import load_config
    from pipeline.driver import display
    from pipeline.driver.groups import has_groups
    from pipeline.driver.progress import make_progress
    from pipeline.driver.run import execute, prepare

    settings = load_config(config, overrides or [])
    out = _out()
    with _interruptible(_resume_command(config, overrides or [], address)):
        if has_groups(settings):
            _run_groups(settings, resume=resume, address=address)
            return
        prepared = prepare(settings, resume=resume)
        if prepared.nothing_to_do:
            assert prepared.stored is not None
            out.print(f"{settings.run_dir} already holds this run, finished; nothing was done.", soft_wrap=True)
            results = prepared.stored.results
        else:
            display.print_choice(out, prepared.plan, searching=prepared.searching)
            results = execute(prepared, address=address, progress=make_progress(_err()))
        display.print_results(out, results, settings.run_dir)
    if results.get("rtol_reached") is False:
        raise typer.Exit(3)


@app.command(epilog="Example: nntk plan configs/digits.yaml --set data.train=1000")
def plan(config: ConfigPath, overrides: Overrides = None) -> None:
    """Show what would run: tiles, operations, time, disk and memory, the estimator and why."""
    from pipeline.config.schema import load_config
    from pipeline.driver import display
    from pipeline.driver.groups import has_groups, prepare_groups
    from pipeline.driver.run import prepare

    settings = load_config(config, overrides or [])
    with _interruptible(None):
        if has_groups(settings):
            for name, each in prepare_groups(settings, resume=True).items():
                _print_group(name)
                display.print_plan(_out(), each.plan, searching=False)
            return
        prepared = prepare(settings, resume=True)
        display.print_plan(_out(), prepared.plan, searching=prepared.searching)


@app.command(epilog="Example: nntk status runs/digits")
def status(run_dir: RunDir) -> None:
    """Show how far a run is, and whether its driver is alive."""
    from pipeline.decisions.stored_run import stored_job
    from pipeline.driver import display
    from pipeline.records.ledger import Ledger
    from pipeline.records.lock import driver_alive, read_heartbeat

    for storage, manifest in _open(run_dir):
        heartbeat = read_heartbeat(storage) if driver_alive(storage) else None
        display.print_status(_out(), manifest, stored_job(manifest), Ledger(storage), heartbeat)


@app.command(epilog="Example: nntk verify runs/digits --recompute 10 --forget")
def verify(
    run_dir: RunDir,
    recompute: Annotated[int, typer.Option(min=0, help="Tiles to compute again and compare.")] = 3,
    forget: Annotated[bool, typer.Option("--forget", help="Let run --resume redo damaged tasks.")] = False,
) -> None:
    """Check a store: completeness, checksums, symmetry, NaN, some tiles computed again.

    The exit code is 1 if a check fails.
    """
    from pipeline.driver import display
    from pipeline.driver.verify import Damage
    from pipeline.driver.verify import forget as forget_tasks
    from pipeline.driver.verify import verify as checks

    out, failed = _out(), False
    for storage, manifest in _open(run_dir):
        damaged: list[Damage] = []
        with _interruptible(None):
            for finding in checks(storage, manifest, recompute=recompute):
                display.print_finding(out, finding)
                failed |= not finding.passed
                damaged += finding.damaged
        tasks = {(each.stage, each.tile) for each in damaged}
        if damaged and forget:
            forget_tasks(storage, damaged)
            out.print(f"forgot {len(tasks)} damaged task(s); run the configuration with --resume to do them again")
        elif damaged:
            out.print(f"{len(tasks)} damaged task(s); add --forget, then run with --resume, to do them again")
    raise typer.Exit(1 if failed else 0)


@app.command(epilog="Example: nntk report runs/digits")
def report(run_dir: RunDir) -> None:
    """Write the HTML report of a run again."""
    from nntk_dist.errors import StoreError
    from pipeline.driver.report_inputs import write_report

    for storage, manifest in _open(run_dir):
        if manifest.completed is None:
            raise StoreError(f"{run_dir} holds an unfinished run; continue it with nntk run … --resume, then report")
        write_report(storage, manifest)
        _out().print(f"report: {storage.url}/report/index.html", soft_wrap=True)


def main() -> NoReturn:
    """Run the command line; errors that the user can fix become one line and exit code 2."""
    if "" not in sys.path:  # python:module:function finds modules of the current folder, also for the console script
        sys.path.insert(0, "")
    try:
        with _notes_shown():
            app(prog_name="nntk")
    except ValueError as error:
        from nntk_dist.errors import NNTKError

        if not isinstance(error, NNTKError):
            raise
        err = _err()
        err.print("error:", style="bold red", end=" ")
        err.print(" ".join(str(error).split()), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    sys.exit(0)


@contextmanager
def _notes_shown() -> Iterator[None]:
    """Print what the library logs, such as how a checkpoint was made to fit, on standard error."""
    logger, handler = logging.getLogger("nntk_dist"), logging.StreamHandler(sys.stderr)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _out() -> "Console":
    from rich.console import Console

    return Console()


def _err() -> "Console":
    from rich.console import Console

    return Console(stderr=True)


def _open(run_dir: str) -> "Iterator[tuple[RunStorage, Manifest]]":
    """Yield the run in a directory, or the runs of its groups of parameters, each below its name."""
    from nntk_dist.errors import StoreError
    from pipeline.driver.groups import stored_groups
    from pipeline.records.manifest import read_manifest
    from pipeline.storage.run_storage import RunStorage

    storage = RunStorage(run_dir)
    groups = stored_groups(storage)
    for name, run in groups.items():
        _print_group(name)
        yield run
    if groups:
        return
    manifest = read_manifest(storage)
    if manifest is None:
        raise StoreError(f"{run_dir} holds no run: there is no manifest.json; give the run_dir of a configuration")
    yield storage, manifest


def _run_groups(settings: "Config", *, resume: bool, address: str | None) -> None:
    """Run a configuration with groups of parameters, and print the results of each group."""
    from pipeline.driver import display
    from pipeline.driver.groups import execute_groups, prepare_groups
    from pipeline.driver.progress import make_progress

    groups, out = prepare_groups(settings, resume=resume), _out()
    if all(each.nothing_to_do for each in groups.values()):
        out.print(f"{settings.run_dir} already holds this run, finished; nothing was done.", soft_wrap=True)
        results = {name: each.stored.results for name, each in groups.items() if each.stored is not None}
    else:
        for name, each in groups.items():
            _print_group(name)
            display.print_choice(out, each.plan, searching=False)
        results = execute_groups(groups, settings, address=address, progress=make_progress(_err()))
    for name, own in results.items():
        _print_group(name)
        display.print_results(out, own, groups[name].config.run_dir)


def _print_group(name: str) -> None:
    _out().print(f"group {name}", style="bold", markup=False, highlight=False)


def _resume_command(config: Path, overrides: list[str], address: str | None) -> str:
    sets = [part for override in overrides for part in ("--set", override)]
    place = ["--address", address] if address else []
    program = ["nntk"] if shutil.which("nntk") else [sys.executable, "-m", "pipeline"]
    return shlex.join([*program, "run", str(config), *sets, "--resume", *place])


@contextmanager
def _interruptible(resume_command: str | None) -> Iterator[None]:
    """End cleanly on Ctrl-C or a scheduler's SIGTERM: exit code 130 and the command that continues."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        err = _err()
        err.print("\nstopped; finished tasks are kept.", style="yellow")
        if resume_command:
            err.print(f"continue with: {resume_command}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, previous)
