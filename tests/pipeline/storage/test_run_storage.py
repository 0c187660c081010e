"""The run directory on a local disk and in an object store."""

import os
import pickle
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import zarr
from obstore.store import LocalStore

from nntk_dist.errors import NNTKError
from pipeline.storage.run_storage import RunStorage

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(params=["local", "remote"])
def storage(request, tmp_path, monkeypatch):
    if request.param == "local":
        return RunStorage(tmp_path / "a run")

    def from_url(url):
        return LocalStore(tmp_path / url.removeprefix("s3://"), mkdir=True)

    monkeypatch.setattr("obstore.store.from_url", from_url)
    return RunStorage("s3://bucket/a-run/")


def test_files_are_written_replaced_listed_and_deleted(storage):
    assert storage.read_bytes("ledger/0.parquet") is None
    assert storage.list() == []
    storage.write_bytes("ledger/0.parquet", b"first")
    storage.write_bytes("ledger/0.parquet", b"second")
    storage.write_bytes("ledger-other/1", b"")
    storage.write_bytes("manifest.json", b"{}")
    assert storage.read_bytes("ledger/0.parquet") == b"second"
    assert storage.read_bytes("ledger/1.parquet") is None
    assert storage.list("ledger") == ["ledger/0.parquet"]
    assert storage.list() == ["ledger-other/1", "ledger/0.parquet", "manifest.json"]
    storage.delete("ledger/0.parquet")
    storage.delete("ledger/0.parquet")
    assert storage.list("ledger") == []


def test_a_zarr_store_of_either_kind_lies_in_kernel_zarr(storage):
    array = zarr.create_array(storage.zarr_store(read_only=False), name="a", shape=(3,), dtype="i8")
    array[:] = 7
    assert zarr.open_group(storage.zarr_store(read_only=True), mode="r")["a"][:].tolist() == [7, 7, 7]
    assert "kernel.zarr/a/zarr.json" in storage.list("kernel.zarr")
    with pytest.raises(ValueError, match="read-only"):
        zarr.create_array(storage.zarr_store(read_only=True), name="b", shape=(3,), dtype="i8")


def test_it_travels_by_its_absolute_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = RunStorage("runs/digits")
    here.write_bytes("x", b"1")
    assert here.url == str(tmp_path / "runs/digits")
    there = pickle.loads(pickle.dumps(here))
    monkeypatch.chdir("/")
    assert there.url == here.url
    assert there.read_bytes("x") == b"1"
    assert RunStorage(f"file://{tmp_path}/runs/digits").url == here.url
    assert pickle.loads(pickle.dumps(RunStorage("s3://bucket/run/"))).url == "s3://bucket/run"


def test_looking_creates_nothing(tmp_path):
    storage = RunStorage(tmp_path / "a" / "b")
    storage.read_bytes("manifest.json")
    storage.list("ledger")
    storage.delete("x")
    storage.zarr_store(read_only=False)
    storage.remove_partial_files()
    storage.check_writable()
    assert list(tmp_path.iterdir()) == []


def test_checking_leaves_an_existing_directory_as_it_was(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    RunStorage(tmp_path).check_writable()
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "run_dir is empty; give a local path"),
        ("ftp://host/run", "scheme of run_dir 'ftp://host/run' is 'ftp'; allowed: s3, gs, az, file"),
        ("s3://", "names no bucket; write s3://bucket/prefix"),
    ],
)
def test_addresses_that_cannot_be(url, message):
    with pytest.raises(NNTKError, match=message):
        RunStorage(url)


def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in ("file", "file/run"):
        with pytest.raises(NNTKError, match=r"/file' is a file, not a folder; choose another run_dir"):
            RunStorage(tmp_path / path).check_writable()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_place_that_cannot_be_written():
    # /proc refuses new folders to everybody, including root, regardless of its permission bits.
    storage = RunStorage("/proc/nntk-run")
    with pytest.raises(NNTKError, match=r"run_dir '/proc/nntk-run' cannot be written \(.+\); choose another"):
        storage.check_writable()
    with pytest.raises(NNTKError, match="cannot write 'x' in run_dir '/proc/nntk-run'"):
        storage.write_bytes("x", b"")


def test_a_bucket_that_does_not_exist(monkeypatch):
    class NoSuchBucket(BaseHTTPRequestHandler):
        def do_PUT(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(404)
            self.end_headers()
            self.wfile.write(b'<?xml version="1.0"?>\n<Error><Code>NoSuchBucket</Code></Error>')

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), NoSuchBucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    try:
        with pytest.raises(
            NNTKError, match=r"cannot write '.writable' in run_dir 's3://nowhere/run': NoSuchBucket; check"
        ) as e:
            RunStorage("s3://nowhere/run").check_writable()
        assert "\n" not in str(e.value)
    finally:
        server.shutdown()


def test_files_that_a_killed_write_leaves_are_removed_and_no_others(tmp_path):
    storage = RunStorage(tmp_path)
    kept = ("manifest.json", "kernel.zarr/a/c/0", "notes.partial", "ledger/7.parquet")
    for name in (*kept, "manifest.json#1", "kernel.zarr/a/c/0.5eb6.partial", "ledger/7.parquet#2"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert storage.remove_partial_files() == 3
    assert all((tmp_path / name).exists() for name in kept)
    assert storage.remove_partial_files() == 0


WRITE_AND_DIE = """
import resource, signal, sys
from pipeline.storage.run_storage import RunStorage
import zarr
storage = RunStorage(sys.argv[1])
array = zarr.open_array(storage.zarr_store(read_only=False), path="a", mode="r+")
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # the system kills whoever writes more into a file
if sys.argv[2] == "shard":
    array[:] = 2
else:
    storage.write_bytes("manifest.json", b"x" * 5000)
"""


@pytest.mark.process
@pytest.mark.parametrize(("write", "pattern"), [("small file", "*#*"), ("shard", "*.partial")])
def test_a_write_that_is_killed_leaves_the_old_content_and_a_file_that_is_removed(tmp_path, write, pattern):
    storage = RunStorage(tmp_path / "run")
    storage.write_bytes("manifest.json", b"old")
    array = zarr.create_array(
        storage.zarr_store(read_only=False), name="a", shape=(5000,), dtype="u1", compressors=None, filters=None
    )
    array[:] = 1
    files = storage.list()
    died = subprocess.run([sys.executable, "-c", WRITE_AND_DIE, storage.url, write], cwd=REPOSITORY, check=False)
    assert died.returncode == -signal.SIGXFSZ
    assert len(list((tmp_path / "run").rglob(pattern))) == 1
    assert storage.remove_partial_files() == 1
    assert sorted(str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file()) == files
    assert storage.read_bytes("manifest.json") == b"old"
    assert (array[:] == 1).all()
