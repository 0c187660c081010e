"""The manifest file, fingerprints, and the naming of differences."""

import hashlib
import json
import subprocess
from datetime import UTC, datetime

import numpy as np
import pytest

from nntk_dist.errors import StoreError
from pipeline.records.manifest import (
    Manifest,
    StageRecord,
    describe_difference,
    environment_versions,
    fingerprint,
    git_commit,
    read_manifest,
    write_manifest,
)
from pipeline.storage.run_storage import RunStorage

NOON = datetime(2025, 6, 1, 12, tzinfo=UTC)
MANIFEST = Manifest(
    created=NOON,
    config={"name": "digits", "kernel": {"gamma": 0.05}},
    fingerprints={"features": "ab12"},
    seeds={"data": 0},
    versions=environment_versions(),
    git_commit=None,
    layout={"tile": 1024},
    sizes={"num_train": 1437},
    decision={"estimator": "autodiff", "reason": "every activation is locally Lipschitz"},
    features={"arrays": [], "is_single": False, "metric": None, "needs_metric": False},
    solvers={"spectrum": {"name": "dense", "reason": "for 149 kernel rows", "arguments": {}, "columns": None}},
    identity={"dtype": "float32"},
)


def test_it_comes_back_as_it_was_written(tmp_path):
    storage = RunStorage(tmp_path)
    assert read_manifest(storage) is None
    record = StageRecord(started=NOON, finished=NOON, seconds=0.1 + 0.2, results={"accuracy": 0.975, "labels": [1, 2]})
    manifest = MANIFEST.with_stage("gram", StageRecord(started=NOON)).with_stage("regression", record)
    write_manifest(storage, MANIFEST)
    write_manifest(storage, manifest)
    assert read_manifest(storage) == manifest
    assert MANIFEST.stages == {}
    assert manifest.finished("regression") == NOON
    assert manifest.finished("gram") is None
    assert manifest.finished("spectrum") is None


def test_it_is_pretty_strict_json_for_others_to_read(tmp_path):
    record = StageRecord(started=NOON, results={"relative_error": float("nan")})
    write_manifest(RunStorage(tmp_path), MANIFEST.with_stage("gram", record))
    text = (tmp_path / "manifest.json").read_text()
    assert '\n  "schema_version": 1,\n' in text
    document = json.loads(text, parse_constant=pytest.fail)
    assert document["created"] == "2025-06-01T12:00:00Z"
    assert document["stages"]["gram"] == {
        "started": "2025-06-01T12:00:00Z",
        "finished": None,
        "seconds": 0.0,
        "results": {"relative_error": None},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"manifest.json in run_dir '.*' is not valid JSON \(.*\); restore it, or choose another run_dir"),
        ("[]", "is broken at the top level"),
        ('{"schema_version": 2}', "has schema version 2; this nntk reads up to 1: use the nntk that wrote it"),
        ('{"schema_version": 1}', "is broken at created: Field required"),
    ],
)
def test_a_broken_or_newer_manifest_is_named(tmp_path, text, message):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=message) as error:
        read_manifest(RunStorage(tmp_path))
    assert "\n" not in str(error.value)


def test_versions_name_what_shapes_results():
    versions = environment_versions()
    assert versions["numpy"] == np.__version__
    assert {"python", "torch", "zarr", "ray", "nntk"} <= set(versions)


def test_git_commit_is_that_of_the_tracking_work_tree(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    source, installed = tmp_path / "module.py", tmp_path / ".venv" / "module.py"
    installed.parent.mkdir()
    for path in (source, installed):
        path.write_text("x = 1\n")
    assert git_commit(source) is None
    git("init", "--quiet")
    git("add", "module.py")
    assert git_commit(source) is None
    git("commit", "--quiet", "--message", "first")
    commit = git("rev-parse", "HEAD")
    assert git_commit(source) == commit
    assert git_commit(installed) is None
    source.write_text("x = 2\n")
    assert git_commit(source) == f"{commit}-dirty"
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text("first\n")
    git("add", ".")
    git("commit", "--quiet", "--message", "second")
    page.write_text("second\n")
    commit = git("rev-parse", "HEAD")
    assert git_commit(source) == f"{commit}-dirty"
    assert git_commit(source, but_for="docs") == commit
    source.write_text("x = 3\n")
    assert git_commit(source, but_for="docs") == f"{commit}-dirty"


def test_a_fingerprint_is_the_hash_of_this_text():
    """Changing the form makes every stored run refuse to resume."""
    parts = {"kernel": {"gamma": 0.05, "draws": "auto"}, "data": np.arange(3, dtype=">i2"), "seed": 0}
    data = hashlib.sha256(bytes([0, 0, 1, 0, 2, 0])).hexdigest()
    text = (
        f'{{"data":{{"dtype":"<i2","sha256":"{data}","shape":[3]}},"kernel":{{"draws":"auto","gamma":0.05}},"seed":0}}'
    )
    assert fingerprint(parts) == hashlib.sha256(text.encode()).hexdigest()


def test_a_fingerprint_sees_content_and_not_representation():
    matrix = np.arange(6.0).reshape(2, 3)
    base = fingerprint({"a": matrix, "b": 1.0, "c": (1, 2)})
    assert fingerprint({"c": [1, 2], "b": np.float64(1.0), "a": np.asfortranarray(matrix).astype(">f8")}) == base
    assert fingerprint({"a": np.repeat(matrix, 2, axis=1)[:, ::2], "b": 1.0, "c": [1, 2]}) == base
    changed = matrix.copy()
    changed[1, 2] = np.nextafter(5.0, 6.0)
    different = [changed, matrix.reshape(3, 2), matrix.astype("f4"), matrix.astype("i8"), matrix.tolist()]
    assert len({base, *(fingerprint({"a": other, "b": 1.0, "c": [1, 2]}) for other in different)}) == 6
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.0})
    assert fingerprint({"a": np.array("text")}) != fingerprint({"a": np.array("tent")})


@pytest.mark.parametrize("value", [object(), np.array([object()]), {1, 2}])
def test_what_has_no_canonical_form_has_no_fingerprint(value):
    with pytest.raises(TypeError, match="no canonical form for a"):
        fingerprint({"a": value})


OLD = {"name": "a", "kernel": {"gamma": 0.05, "parameters": ["*"]}, "regression": {"ridge": [0.1, 1.0]}}


@pytest.mark.parametrize(
    ("new", "text"),
    [
        (OLD, ""),
        ({**OLD, "kernel": {"gamma": 0.1, "parameters": ("*",)}}, "kernel.gamma: 0.05 -> 0.1"),
        ({**OLD, "regression": {"ridge": [0.1]}}, "regression.ridge.1: 1.0 -> absent"),
        ({**OLD, "regression": {"ridge": []}}, "regression.ridge: absent -> []; regression.ridge.0: 0.1 -> absent; "),
        ({**OLD, "seed": None}, "seed: absent -> None"),
        ({**OLD, "name": "b" * 100}, f"name: 'a' -> '{'b' * 59}…"),
        ({}, "name: 'a' -> absent; kernel.gamma: 0.05 -> absent; kernel.parameters.0: '*' -> absent; and 2 more"),
    ],
)
def test_a_difference_is_named_by_its_key(new, text):
    difference = describe_difference(OLD, new)
    assert difference == text or (text.endswith("; ") and difference.startswith(text))


def test_long_values_that_differ_late_and_nan():
    assert describe_difference({"a": "x" * 100 + "1"}, {"a": "x" * 100 + "2"}).startswith("a: 'xxx")
    assert describe_difference({"a": float("nan")}, {"a": float("nan")}) == ""
    assert "\n" not in describe_difference({"a": np.eye(3)}, {"a": np.ones((3, 3))})
