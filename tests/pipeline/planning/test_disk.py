"""A run whose arrays do not fit on the disk of its run directory is refused before anything is written."""

from types import SimpleNamespace

import psutil
import pytest

from nntk_dist.errors import NNTKError
from pipeline.planning.plan import check_disk
from pipeline.storage.run_storage import RunStorage


def test_a_disk_without_room_is_refused_with_both_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    storage = RunStorage(tmp_path / "runs" / "large")
    check_disk(storage, 2**30)
    with pytest.raises(
        NNTKError, match=r"the arrays take 1\.50 GiB on disk and 1\.00 GiB are free at .*; choose another"
    ):
        check_disk(storage, 3 * 2**29)
    assert not (tmp_path / "runs").exists()
