"""Workers that share a GPU, on a machine that need not have one: what is planned, and what is said of it."""

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from pipeline import display
from pipeline.config import config_from_dict
from pipeline.plan import wanted_workers


def config(**compute):
    return config_from_dict(
        {
            "name": "shares",
            "run_dir": "unset",
            "data": {"source": "sklearn:digits"},
            "model": {"builder": "mlp"},
            "compute": compute,
        }
    )


@pytest.mark.parametrize(("compute", "expected"), [({}, 3), ({"workers_per_gpu": 4}, 12), ({"workers": 5}, 5)])
def test_as_many_workers_as_the_gpus_have_places_for(compute, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert wanted_workers(config(**compute), SimpleNamespace(device="cuda", threads=1)) == expected


@pytest.mark.parametrize(
    ("share", "expected"), [(1, "float32 on cuda\n"), (3, "float32 on cuda, 3 workers on each GPU")]
)
def test_the_plan_says_that_they_share(share, expected, monkeypatch):
    monkeypatch.setattr(display, "print_choice", lambda *args, **kwargs: None)
    layout = SimpleNamespace(
        tile=8,
        batch=8,
        store_features=True,
        outputs_at_once=1,
        threads=1,
        dtype="float32",
        device="cuda",
        write_tiles=True,
        matmul_precision="highest",
    )
    job = SimpleNamespace(layout=layout, config=config(workers_per_gpu=share), resolution=SimpleNamespace(probes=None))
    tasks = {stage.NAME: 0 for stage in display.ORDER}
    projection = SimpleNamespace(
        tasks=tasks, seconds={}, operations={}, disk_bytes={}, total_disk_bytes=0, worker_bytes=0, solve_bytes=0
    )
    out = Console(file=io.StringIO(), width=1000)
    plan = SimpleNamespace(job=job, projection=projection, memory_per_worker=0, solvers={})
    display.print_plan(out, plan, searching=False)
    assert expected in out.file.getvalue()
