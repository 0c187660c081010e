"""Runs with a requested accuracy: the pilot's looks, their consequences, interruptions, exit codes.

Axes: S draws.
"""

import json

import numpy as np
import pytest
import torch

from nntk_dist import nonlocal_kernel
from pipeline.config.schema import config_from_dict
from pipeline.decisions.build import build_dataset, build_model
from tests.pipeline.driver.test_stops import WAIT_SECONDS, wait_until
from tests.pipeline.tools import arguments, arrays, assert_same_bits, finished, ledger, nntk, run, start

SETS = (
    "data.train=37",
    "data.test=11",
    "compute.tile=16",
    "model.args={widths: [8]}",
    "kernel.distribution.gamma=0.2",
    "kernel.rtol=0.1",
)
# A driver whose workers wait before the second look until the file `gate` exists, and that flushes every row.
HELD = """
import functools, pathlib, time
import pipeline.work.worker

class Worker(pipeline.work.worker.Worker):
    looks = 0
    def execute(self, task):
        if task.stage == "pilot":
            Worker.looks += 1
            while Worker.looks > 1 and not pathlib.Path("/nowhere").exists():
                time.sleep(0.01)
        return super().execute(task)

pipeline.work.worker.Worker = Worker
import pipeline.driver.run  # now, since its executor takes the worker's name
pipeline.driver.run.Ledger = functools.partial(pipeline.driver.run.Ledger, flush_seconds=0)
"""
KILLED_AFTER = """
import os, signal
import pipeline.driver.run

search = pipeline.driver.run.search_draws

def search_and_die(*arguments):
    search(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

pipeline.driver.run.search_draws = search_and_die
"""


def manifest(run_dir):
    return json.loads((run_dir / "manifest.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("pilot") / "run", *SETS)


def looks(run_dir):
    """The pilot's rows by draws."""
    rows = {int(tile): dict(row["numbers"]) for (stage, tile), row in ledger(run_dir).items() if stage == "pilot"}
    return dict(sorted(rows.items()))


def test_the_run_has_the_draws_of_the_last_look(undisturbed):
    found = looks(undisturbed)
    assert len(found) > 1
    last = max(found)
    kept = manifest(undisturbed)
    assert kept["sizes"]["num_draws"] == kept["decision"]["num_draws"] == kept["results"]["draws"] == last
    assert kept["results"]["rtol_reached"] is True
    assert kept["stages"]["pilot"]["results"]["tasks"] == len(found)
    bounds = [numbers["bound"] for numbers in found.values()]
    assert all(bound > 0.1 for bound in bounds[:-1])
    assert bounds[-1] <= 0.1
    # the stated bound is the pilot's, which is more accurate than one from the run's own eight blocks
    assert kept["results"]["train_relative_error_bound"] == bounds[-1]
    own = ledger(undisturbed)["calibration", "train"]["numbers"]
    assert dict(own)["bound"] == pytest.approx(bounds[-1], rel=0.5)


@pytest.mark.process
def test_the_library_takes_the_same_draws(undisturbed):
    config = config_from_dict(manifest(undisturbed)["config"])
    dataset = build_dataset(config)
    x = torch.from_numpy(dataset.train.inputs)
    estimate = nonlocal_kernel(build_model(config, dataset), x, gamma=0.2, rtol=0.1, statistic="both")
    assert estimate.draws == max(looks(undisturbed))
    stored = arrays(undisturbed)["train/gram_unbiased"]
    np.testing.assert_allclose(estimate.unbiased.numpy(), stored, rtol=0, atol=2e-5 * stored.max())


@pytest.mark.process
@pytest.mark.parametrize(
    "changes", [("compute.executor=ray", "compute.workers=2"), ("compute.memory_per_worker=4GiB",)]
)
def test_how_it_is_carried_out_changes_no_bit(changes, undisturbed, tmp_path):
    other = finished(tmp_path / "run", *SETS, *changes)
    assert looks(other) == looks(undisturbed)
    assert_same_bits(other, undisturbed)


@pytest.mark.process
def test_a_driver_killed_in_the_pilot(undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    driver = start(*arguments("run", run_dir, *SETS), prelude=HELD)
    wait_until(lambda: (run_dir / "ledger").is_dir() and looks(run_dir), driver)
    driver.kill()
    driver.communicate(timeout=WAIT_SECONDS)
    first = looks(run_dir)
    assert len(first) == 1
    state = nntk("status", run_dir)
    assert "stopped" in state.out
    assert "pilot" in state.out
    refused = run(run_dir, *SETS)
    assert refused.code == 2
    assert "holds an unfinished run of this configuration; to continue it, add --resume" in refused.err
    started = {key: row["started"] for key, row in ledger(run_dir).items()}
    finished(run_dir, *SETS, resume=True)
    after = ledger(run_dir)
    assert {key: after[key]["started"] for key in started} == started  # the existing look was not repeated
    assert looks(run_dir) == looks(undisturbed)
    assert_same_bits(run_dir, undisturbed)


@pytest.mark.process
def test_a_driver_killed_behind_the_last_look(undisturbed, tmp_path):
    """Every look is in the ledger, but the manifest still describes the first."""
    run_dir = tmp_path / "run"
    driver = start(*arguments("run", run_dir, *SETS), prelude=KILLED_AFTER)
    driver.communicate(timeout=WAIT_SECONDS)
    assert driver.returncode == -9
    assert looks(run_dir) == looks(undisturbed)
    assert manifest(run_dir)["sizes"]["num_draws"] == min(looks(undisturbed))
    finished(run_dir, *SETS, resume=True)
    assert_same_bits(run_dir, undisturbed)
    assert manifest(run_dir)["stages"]["pilot"]["results"]["tasks"] == len(looks(undisturbed))


@pytest.mark.process
def test_an_accuracy_that_is_not_reached_ends_with_3(tmp_path):
    sets = (*SETS, "kernel.max_draws=20")
    result = run(tmp_path / "run", *sets)
    assert result.code == 3
    assert "rtol 0.1 is not reached: bound" in result.out
    assert "with 16 draws, and max_draws is 20" in result.out
    kept = manifest(tmp_path / "run")
    assert kept["results"]["rtol_reached"] is False
    assert kept["completed"] is not None
    again = run(tmp_path / "run", *sets)  # nothing is left to do, and still it is not reached
    assert again.code == 3
    assert "already holds this run, finished" in again.out
    assert nntk("verify", tmp_path / "run").code == 0


def test_plan_says_what_is_open(undisturbed, tmp_path):
    open_plan = nntk(*arguments("plan", tmp_path / "run", *SETS))
    assert "8 draws or more (up to 65,536), as rtol 0.1 requires" in open_plan.out
    found = nntk(*arguments("plan", undisturbed, *SETS))
    assert f" {max(looks(undisturbed))} draws, " in found.out


def test_another_accuracy_is_another_kernel(undisturbed):
    result = run(undisturbed, *SETS, "kernel.rtol=0.3", resume=True)
    assert result.code == 2
    assert "holds another kernel: kernel.rtol: 0.1 -> 0.3" in result.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("kernel.rtol=2", "kernel.rtol is 2; allowed: null, or a number above 0 and below 1, such as 0.05"),
        ("kernel.draws=131072", "kernel.draws is 131072, the start of the search for rtol; allowed: auto, or up to"),
        ("kernel.kind=local", "kernel.rtol is 0.1; allowed for kind local, which has no draws: none"),
        ("kernel.max_draws=4", "max_draws is 4; allowed: 8 or more, one group of design iid in each of 8 blocks"),
    ],
)
def test_wrong_words(change, message, tmp_path):
    result = run(tmp_path / "run", *SETS, change)
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "run").exists()
