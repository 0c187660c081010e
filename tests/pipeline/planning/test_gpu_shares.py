"""Workers that share a GPU, on a machine that need not have one: the plan and its report."""

import io
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from nntk_dist import NNTKError
from pipeline.config.schema import config_from_dict
from pipeline.driver import display
from pipeline.planning.plan import check_device, check_gpu_memory, wanted_workers
from pipeline.planning.projection import share_of_rate


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
    ("compute", "message"),
    [
        ({"device": "cuda:3"}, "compute.device is 'cuda:3', but torch sees cuda:0 to cuda:2 here"),
        ({"device": "cuda:1", "executor": "ray"}, "with Ray every worker has its own GPUs.* set compute.device=cuda"),
        ({"device": "cuda:0", "executor": "ray"}, None),
        ({"device": "cuda:2", "executor": "serial"}, None),
        ({"device": "cpu", "workers_per_gpu": 2}, "workers_per_gpu is 2, but the run is on cpu"),
    ],
)
def test_devices_that_there_are(compute, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with nullcontext() if message is None else pytest.raises(NNTKError, match=message):
        check_device(compute["device"], config(**compute).compute)


@pytest.mark.parametrize(
    ("device", "compute", "expected"),
    [("cuda", {"workers_per_gpu": 4}, 0.25), ("cuda", {}, 1.0), ("cpu", {"threads": 8}, 8.0)],
)
def test_what_a_worker_has_of_a_machine(device, compute, expected):
    layout = SimpleNamespace(device=device, threads=compute.get("threads", 1))
    assert share_of_rate(SimpleNamespace(layout=layout, config=config(**compute))) == expected


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
    job = SimpleNamespace(
        layout=layout, config=config(workers_per_gpu=share), decision=SimpleNamespace(probes=None), solvers={}
    )
    tasks = {stage.name: 0 for stage in display.stages_of()}
    projection = SimpleNamespace(
        tasks=tasks, seconds={}, operations={}, disk_bytes={}, total_disk_bytes=0, worker_bytes=0, solve_bytes=0
    )
    written = io.StringIO()
    plan = SimpleNamespace(job=job, projection=projection, memory_per_worker=0, solvers={})
    display.print_plan(Console(file=written, width=1000), plan, searching=False)
    assert expected in written.getvalue()


def test_where_there_is_no_gpu_the_refusal_says_who_wanted_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NNTKError, match=r"compute.device is 'cuda', but torch sees no GPU here; .*entrypoint-num-gpus"):
        check_device("cuda", config(device="cuda").compute)
    with pytest.raises(NNTKError, match="the run was laid out on 'cuda', but torch sees no GPU here"):
        check_device("cuda", config().compute, continued=True)


def test_workers_are_to_fit_into_what_is_free_of_their_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 << 30, 80 << 30))
    layout = SimpleNamespace(device="cuda", tile=4096, stderr="sample")
    check_gpu_memory(3 << 30, layout, 3)
    with pytest.raises(NNTKError, match=r"needs 3.00 GiB of its GPU's memory .* 9.00 GiB are usable for 4 worker"):
        check_gpu_memory(3 << 30, layout, 4)
