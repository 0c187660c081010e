"""`nntk verify` finds and locates damage; `nntk plan` states what a run will take and refuses what cannot fit; `nntk
status` and `nntk report` on finished runs.
"""

import json
import re
import shutil

import numpy as np
import pytest
import zarr

import pipeline.planning.plan
from nntk_dist import open_kernel
from pipeline.config.schema import load_config
from pipeline.driver.run import prepare
from pipeline.work.sampled_calibration import most_sampled_rows
from tests.pipeline.tools import arguments, config_file, finished, ledger, nntk, snapshot

CHECKS = ("completeness", "checksums", "symmetry", "finiteness", "recomputation")


def verdicts(result):
    """Which checks of `verify` passed."""
    lines = [line for line in result.out.splitlines() if line.partition(":")[0] in CHECKS]
    return {line.partition(":")[0]: "FAILED" not in line for line in lines}


@pytest.fixture
def damaged(own_run):
    """The shard [64:128, 0:64] of a finished run's train kernel."""
    return own_run, own_run / "kernel.zarr/train/gram/c/1/0"


def test_a_good_run_passes_every_check_and_stays_as_it_is(good_run):
    before = snapshot(good_run)
    result = nntk("verify", good_run, "--recompute", 100)
    assert result.code == 0
    assert verdicts(result) == dict.fromkeys(CHECKS, True)
    assert "10 of 10 recomputed tiles have the same bits" in result.out
    assert snapshot(good_run) == before


@pytest.mark.parametrize("position", [0.25, 0.5, 0.75])
def test_a_flipped_byte(position, damaged):
    run_dir, shard = damaged
    content = bytearray(shard.read_bytes())
    content[int(position * len(content))] ^= 1
    shard.write_bytes(content)
    result = nntk("verify", run_dir)
    assert result.code == 1, result.err
    assert not verdicts(result)["checksums"]
    assert "train/gram at (64, 0)" in result.out


@pytest.mark.parametrize("cut", [None, 0, 100])
def test_a_missing_or_shortened_shard(cut, damaged):
    run_dir, shard = damaged
    content = shard.read_bytes()
    shard.unlink()
    if cut is not None:
        shard.write_bytes(content[:cut])
    result = nntk("verify", run_dir)
    assert result.code == 1, result.err
    assert not verdicts(result)["checksums"]
    assert "train/gram at (64, 0)" in result.out


def test_wrong_values_with_a_valid_checksum(damaged):
    run_dir, _ = damaged
    array = zarr.open_array(run_dir / "kernel.zarr/train/gram", mode="r+")
    array[64:128, 0:64] = array[64:128, 0:64] * 1.01
    result = nntk("verify", run_dir)
    assert result.code == 1
    assert not verdicts(result)["checksums"]
    assert not verdicts(result)["symmetry"]
    assert "train/gram at (64, 0)" in result.out


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(value, damaged):
    run_dir, _ = damaged
    array = zarr.open_array(run_dir / "kernel.zarr/train/gram", mode="r+")
    block = array[0:64, 0:64]
    block[3, 3] = value
    array[0:64, 0:64] = block
    result = nntk("verify", run_dir, "--recompute", 100)
    assert result.code == 1, result.err
    assert verdicts(result) == dict.fromkeys(CHECKS, False) | {"completeness": True, "symmetry": True}


@pytest.mark.parametrize("path", ["train/features/input_1", "test/outputs", "test/diagonal"])
def test_damage_outside_of_the_train_kernel(path, own_run):
    files = [file for file in (own_run / "kernel.zarr" / path / "c").rglob("*") if file.is_file()]
    files[0].unlink()
    result = nntk("verify", own_run)
    assert result.code == 1, result.err
    assert not verdicts(result)["checksums"]
    assert f"the first damaged piece: {path} at " in result.out


def test_a_wrong_kernel_that_the_ledger_vouches_for(own_run, shared_run):
    """Another run's kernel and ledger under this run's manifest: only recomputing finds it."""
    other = shared_run("kernel.seed=1")
    for part in ("train/gram", "test/gram"):
        shutil.rmtree(own_run / "kernel.zarr" / part)
        shutil.copytree(other / "kernel.zarr" / part, own_run / "kernel.zarr" / part)
    shutil.rmtree(own_run / "ledger")
    shutil.copytree(other / "ledger", own_run / "ledger")
    result = nntk("verify", own_run)
    assert result.code == 1
    assert not verdicts(result)["recomputation"]


def test_a_run_that_was_moved_is_verified_where_it_is(own_run, tmp_path, monkeypatch):
    moved = shutil.copytree(own_run, tmp_path / "elsewhere")
    (moved / "kernel.zarr/test/gram/c/0/0").unlink()
    monkeypatch.chdir(tmp_path)
    assert nntk("verify", "elsewhere").code == 1
    assert nntk("verify", "run").code == 0


def test_an_unfinished_run_is_not_complete(good_run, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.work.stages.test.Test.execute", stop)
    assert nntk(*arguments("run", tmp_path / "run")).code == 130
    monkeypatch.undo()
    result = nntk("verify", tmp_path / "run")
    assert result.code == 1, result.err
    assert "11 of 17 tasks are in the ledger; the first missing: test test/0/0" in result.out


def stop(*_arguments):
    raise KeyboardInterrupt


def test_status_and_report_of_a_finished_run(own_run):
    state = nntk("status", own_run)
    assert (state.code, state.out.splitlines()[0]) == (0, "small: finished")
    counts = {line.split()[0]: line.split()[1:3] for line in state.out.splitlines()[2:]}
    assert counts["gram"] == ["6", "6"]
    assert counts["features"] == ["2", "2"]
    page = own_run / "report/index.html"
    page.unlink()
    assert nntk("report", own_run).code == 0
    assert "<html" in page.read_text()


def test_a_plan_says_what_a_run_will_take(good_run, tmp_path):
    result = nntk(*arguments("plan", tmp_path / "run"))
    assert result.code == 0
    text = " ".join(result.out.split())
    assert "estimator autodiff: the model is locally Lipschitz" in text
    rows = {line.split()[0]: line.split()[1] for line in result.out.splitlines() if line.split()}
    assert (rows["gram"], rows["test"], rows["spectrum"]) == ("6", "4", "1")
    for part in ("disk: ", "gram 111 KiB", "memory: ", " per worker, ", "tile 64", "time: about"):
        assert part in text
    assert not (tmp_path / "run").exists()
    shutil.copytree(good_run, tmp_path / "run")
    assert nntk(*arguments("plan", tmp_path / "run")).out.splitlines()[0] == result.out.splitlines()[0]


def test_the_projected_bytes_are_those_that_are_written(good_run):
    projection = json.loads((good_run / "manifest.json").read_text())["projection"]
    root = zarr.open_group(good_run / "kernel.zarr", mode="r")
    written = sum(member.nbytes for _, member in root.members(max_depth=None) if isinstance(member, zarr.Array))
    assert sum(projection["disk_bytes"].values()) == written


@pytest.mark.parametrize(
    ("sets", "available", "match"),
    [
        (("compute.tile=1024", "data.train=1700", "data.test=90"), 1 << 29, "a worker needs .* compute.tile smaller"),
        (
            ("data.train=1700", "data.test=90", "model.args={widths: [4]}"),
            600 << 20,
            "spectrum and regression of 1700 train rows need .* in one",
        ),
        (("compute.workers=64",), 4 << 30, "may take 0.06 GiB .*for 64 worker"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_numbers(sets, available, match, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.planning.plan, "available_memory", lambda: available)
    for verb in ("plan", "run"):
        result = nntk(*arguments(verb, tmp_path / "run", "compute.executor=ray", *sets))
        assert result.code == 2
        assert len(result.err.splitlines()) == 1
        assert re.search(match, result.err), result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        ((), 4),  # by the memory that workers need
        (("compute.memory_per_worker=1GiB",), 2),  # by the memory that they may use
        (("compute.memory_per_worker=4GiB",), 1),  # at least one: a cluster's memory may be elsewhere
        (("compute.memory_per_worker=1GiB", "compute.workers=5"), 5),  # as requested
    ],
)
def test_as_many_workers_as_memory_allows(sets, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.planning.plan, "available_memory", lambda: int(2.5 * 2**30))
    monkeypatch.setattr(pipeline.planning.plan, "available_cpus", lambda: 8)
    config = load_config(config_file(tmp_path / "run"), [f"run_dir={tmp_path / 'run'}", "compute.executor=ray", *sets])
    assert prepare(config, resume=False).plan.num_workers == expected


def test_a_few_rows_of_a_large_model_are_read_in_the_chunks_that_they_are_stored_in(tmp_path):
    """Ten gradients of 270,000 parameters a row are 0.3 GiB for 31 rows; a whole run takes 1.2 GiB."""
    sets = ["data.train=31", "data.test=11", "compute.tile=4", "compute.stderr=none", "kernel.kind=local"]
    sets += [f"run_dir={tmp_path / 'run'}", "model.builder=resnet", "model.args={}"]
    plan = prepare(load_config(config_file(tmp_path / "run"), sets), resume=False).plan
    assert plan.job.layout.store_features
    assert 1.2 * 2**30 < plan.projection.worker_bytes < 2.5 * 2**30


@pytest.mark.parametrize(("test", "sampled"), [(41, 41 + 99), (2, 2 + 149), (700, 256)])
def test_the_rows_whose_features_are_sampled_at_once(test, sampled, tmp_path):
    """4,096 entries in all, 256 of a diagonal: few test rows take many columns, many are sampled themselves."""
    sets = [f"run_dir={tmp_path / 'run'}", f"data.test={test}", "compute.stderr=sample"]
    plan = prepare(load_config(config_file(tmp_path / "run"), sets), resume=False).plan
    assert most_sampled_rows(plan.job) == sampled


def test_what_was_made_of_wrong_values_that_could_be_read_is_done_again_too(damaged):
    run_dir, shard = damaged
    content, expected = shard.read_bytes(), snapshot(run_dir / "tables")
    array = zarr.open_array(run_dir / "kernel.zarr/train/gram", mode="r+")
    array[64:128, 0:64] = wrong = array[64:128, 0:64] * 1.01
    array[0:64, 64:128] = wrong.T
    finished(run_dir, "spectrum.top_k=4", resume=True)  # its spectrum comes from the wrong values
    assert "forgot 1 damaged task(s)" in nntk("verify", run_dir, "--forget").out
    assert {stage for stage, _ in ledger(run_dir)} == {"features", "calibration", "gram", "test"}
    assert not open_kernel(run_dir).complete
    finished(run_dir, resume=True)
    assert shard.read_bytes() == content
    assert {name: data for name, (_, data) in snapshot(run_dir / "tables").items()} == {
        name: data for name, (_, data) in expected.items()
    }


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_what_is_damaged_can_be_forgotten_and_done_again_with_the_same_bits(damage, damaged):
    run_dir, shard = damaged
    content = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    assert "add --forget, then run with --resume" in nntk("verify", run_dir).out
    result = nntk("verify", run_dir, "--forget")
    assert result.code == 1
    assert "forgot 1 damaged task(s)" in result.out
    kept = ledger(run_dir)
    after = ledger(finished(run_dir, resume=True))
    assert shard.read_bytes() == content
    assert {task: after[task] for task in kept} == kept
    assert set(after) - set(kept) == {("gram", "train/0/1")}
    assert nntk("verify", run_dir).code == 0


def test_what_cannot_be_reached_is_not_forgotten(damaged, monkeypatch):
    run_dir, _ = damaged
    kept = ledger(run_dir)

    async def refuse(*_args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(zarr.storage.LocalStore, "getsize", refuse)
    result = nntk("verify", run_dir, "--forget")
    assert result.code == 1
    assert "is out of reach (Permission denied)" in " ".join(result.out.split())
    assert ledger(run_dir) == kept
    monkeypatch.undo()
    assert nntk("verify", run_dir).code == 0
