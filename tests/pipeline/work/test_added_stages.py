"""A stage from a user's module: run, kept in the ledger, its numbers in the results, repeated after its inputs."""

import json
import sys

import pyarrow.parquet as pq
import pytest

from nntk_dist.errors import NNTKError
from pipeline.work.stages import _make, stages_of, with_readers
from tests.pipeline.tools import arguments, finished, ledger, nntk, run

MODULE = """
from pipeline.storage.tables import write_table
from pipeline.work.context import Written
from pipeline.work.stage import Stage

SCALE = 1.0

def scale():
    return SCALE

class Trace(Stage):
    name = "trace"
    reads = ("gram",)
    uses_all_threads = True

    def execute(self, context, task):
        trace = scale() * float(context.store.read("train/gram").trace())
        written = write_table(context.storage, "trace", {"trace": [trace]})
        return Written(num_bytes=written, numbers={"value": trace})

class Doubled(Trace):
    reads = ("nothing",)

class Gram(Trace):
    name = "gram"

def not_a_stage():
    return 3
"""


def write(folder, text):
    """Write the module of stages; the next import reads it."""
    (folder / "my_stages.py").write_text(text)
    sys.modules.pop("my_stages", None)
    _make.cache_clear()
    stages_of.cache_clear()


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    # a cache of bytecode does not notice a file that changes within a second
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    write(tmp_path, MODULE)
    yield 'stages=["python:my_stages:Trace"]'
    write(tmp_path, MODULE)


def results(run_dir):
    return json.loads((run_dir / "manifest.json").read_text())["results"]


def test_a_stage_is_added_to_a_finished_run(module, own_run):
    before = ledger(own_run)
    refused = run(own_run, module)
    assert refused.code == 2
    assert "resume=True) reruns only trace" in refused.err
    finished(own_run, module, resume=True)
    after = ledger(own_run)
    assert {key: after[key] for key in before} == before
    assert set(after) - set(before) == {("trace", "trace")}
    trace = pq.read_table(own_run / "tables/trace.parquet").to_pydict()["trace"][0]
    assert results(own_run)["trace_value"] == trace
    assert trace == pytest.approx(results(own_run)["spectrum_plugin_trace"], rel=1e-6)
    assert "trace" in {line.split()[0] for line in nntk("status", own_run).out.splitlines()[1:]}
    assert "nothing was done" in run(own_run, module, resume=True).out


@pytest.mark.parametrize(
    ("old", "new", "factor"),
    [(".trace())", ".trace()) * 2.0", 2.0), ("SCALE = 1.0", "SCALE = 3.0", 3.0), ("return SCALE", "return 4.0", 4.0)],
)
def test_a_stage_whose_code_changed_runs_again_alone(old, new, factor, module, own_run, tmp_path):
    finished(own_run, module, resume=True)
    rows, value = ledger(own_run), results(own_run)["trace_value"]
    assert value == pytest.approx(results(own_run)["spectrum_plugin_trace"], rel=1e-6)

    write(tmp_path, "# a comment\n" + MODULE)
    assert "nothing was done" in run(own_run, module).out
    write(tmp_path, MODULE.replace(old, new))
    refused = run(own_run, module)
    assert refused.code == 2
    assert "was finished with another trace: the code has changed since" in " ".join(refused.err.split())
    finished(own_run, module, resume=True)
    assert results(own_run)["trace_value"] == pytest.approx(factor * value)
    changed = {key for key, row in ledger(own_run).items() if row["started"] != rows[key]["started"]}
    assert changed == {("trace", "trace")}
    assert "nothing was done" in run(own_run, module).out


def test_what_is_damaged_is_read_by_these(module):
    own, with_trace = stages_of(), stages_of(("python:my_stages:Trace",))
    assert with_readers(["features"], own) == {"features", "calibration", "gram", "test", "spectrum", "regression"}
    assert with_readers(["metric"], own) == {"metric", "calibration", "gram", "test", "spectrum", "regression"}
    assert with_readers(["gram"], with_trace) == {"gram", "spectrum", "regression", "trace"}
    assert with_readers(["test"], with_trace) == {"test", "regression"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Doubled", "stage 'trace' reads 'nothing', and no stage before it has that name"),
        ("Gram", "stages has two stages called 'gram'"),
        ("not_a_stage", r"is no pipeline\.work\.stage\.Stage; make it a subclass"),
        ("Nothing", "has no 'Nothing'"),
    ],
)
def test_refusals(module, name, message):
    with pytest.raises(NNTKError, match=message):
        stages_of((f"python:my_stages:{name}",))


def test_a_refusal_is_one_line(module, tmp_path):
    planned = nntk(*arguments("plan", tmp_path / "run", 'stages=["python:my_stages:Doubled"]'))
    assert planned.code == 2
    assert len(planned.err.splitlines()) == 1
