"""Wrong inputs through the command line: exit code 2, one line on standard error, nothing created, nothing changed."""

import json
import re

import numpy as np
import pytest
import torch

from tests.pipeline.driver.test_stops import WAIT_SECONDS
from tests.pipeline.tools import arguments, assert_same_bits, finished, nntk, run, snapshot, start

MODULE = """
import torch

class Constant(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(64, 10))
        self.value = value
    def forward(self, x):
        return x.flatten(1) @ self.weight + self.value

def not_a_number():
    return Constant(float("nan"))

def raises():
    raise RuntimeError("out of ideas\\nand of luck")

def no_module():
    return 3

def wrong_shape():
    return torch.nn.Linear(8, 8)

def other_width():
    return torch.nn.Linear(5, 8)

def wide():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))

def lazy():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(3))

def locked():
    import threading

    model = wide()
    model.lock = threading.Lock()
    return model

def data():
    raise OSError("no such disk")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with data files, a module and every kind of wrong checkpoint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "faulty.py").write_text(MODULE)
    values = np.random.default_rng(0).standard_normal((30, 4))
    gap, hole = values.copy(), values[:, 0].copy()
    gap[7, 2], hole[5] = np.nan, np.nan
    np.savez("lengths.npz", x=values, y=values[:20, 0])
    np.savez("names.npz", a=values, b=values)
    np.savez("empty.npz", x=values[:0], y=values[:0, 0])
    np.savez("gap.npz", x=gap, y=values[:, 0])
    np.savez("hole.npz", x=values, y=hole)
    (tmp_path / "text.npz").write_text("these are no arrays")
    torch.save({"somewhere.weight": torch.zeros(3, 3)}, "other.pt")
    (tmp_path / "text.pt").write_text("this is no checkpoint")
    (tmp_path / "file").write_text("in the way")
    return tmp_path


BASIC = ("data.train=20", "data.test=10")
WRONG = {
    "unknown key": (("kernel.gama=1",), "unknown key kernel.gama"),
    "near key": (("compute.tiles=8",), "did you mean 'tile'"),
    "no equals sign": (("kernel.seed",), "expected KEY=VALUE"),
    "path through a value": (("name.first=a",), "single value: it has no key 'first'"),
    "bad value": (("kernel.distribution.gamma=-1",), "gamma is -1; allowed: a number above 0"),
    "text for a number": (("compute.tile=big",), "compute.tile is 'big'"),
    "unknown kind": (("kernel.kind=nonlocl",), "did you mean 'nonlocal'"),
    "draws and blocks": (("kernel.draws=30",), "does not fill 8 blocks"),
    "draws and pairs": (("kernel.draws=8", "kernel.design=antithetic"), "multiple of 16"),
    "unknown contraction": (("kernel.contraction=scetch",), "did you mean 'sketch'"),
    "a sketch that groups cannot share": (("kernel.sketch=100",), "sketch is 100; allowed: auto, or a multiple of 16"),
    "a sketch of another kind": (("kernel.kind=averaged", "kernel.contraction=sketch"), "allowed for kind averaged"),
    "a sketch of differences": (("kernel.estimator=weight", "kernel.contraction=sketch"), "allowed for estimator weig"),
    "three blocks": (("kernel.blocks=3",), "4 or more"),
    "unknown family": (("data.source=sklearnn:digits",), "did you mean 'sklearn'"),
    "unknown data set": (("data.source=sklearn:digit",), "did you mean 'digits'"),
    "missing data file": (("data.source=npz:nowhere.npz",), "'nowhere.npz' does not exist"),
    "no arrays": (("data.source=npz:text.npz",), "no readable .npz archive"),
    "wrong names": (("data.source=npz:names.npz",), "has no 'x'"),
    "wrong lengths": (("data.source=npz:lengths.npz", *BASIC), "30 rows but its targets have 20"),
    "no rows": (("data.source=npz:empty.npz", *BASIC), "is empty"),
    "NaN in the data": (("data.source=npz:gap.npz", *BASIC), "NaN.*the first of them row 7"),
    "NaN in the targets": (("data.source=npz:hole.npz", *BASIC), "targets of .*NaN.*row 5"),
    "a data function that raises": (("data.source=python:faulty:data",), "no such disk"),
    "more rows than there are": (("data.train=1700", "data.test=98"), "1798 examples, but .* has 1797 rows"),
    "no rows left to test": (("data.train=1797", "data.test=null"), "no test examples"),
    "unknown model": (("model.builder=mlpp",), "did you mean 'mlp'"),
    "unknown argument": (("model.args={width: [3]}",), "width"),
    "bad argument": (("model.args={widths: [0]}",), "widths"),
    "unknown activation": (("model.args={widths: [3], activation: rellu}",), "did you mean 'relu'"),
    "unknown module": (("model.builder=python:nowhere:build", "model.args={}"), "nowhere"),
    "unknown function": (("model.builder=python:faulty:nothing", "model.args={}"), "nothing"),
    "a builder that raises": (("model.builder=python:faulty:raises", "model.args={}"), "out of ideas and of luck"),
    "a builder of something else": (("model.builder=python:faulty:no_module", "model.args={}"), "faulty:no_module"),
    "a model that gives NaN": (
        ("model.builder=python:faulty:not_a_number", "model.args={}"),
        "NaN or infinity for 4 of 4",
    ),
    "a model of another input": (
        ("model.builder=python:faulty:wrong_shape", "model.args={}"),
        r"the model returned shape \(4, 1, 8, 8\) for 4 examples; allowed: \(4,\) or \(4, C\): choose a position",
    ),
    "a model that cannot take the data": (
        ("model.builder=python:faulty:other_width", "model.args={}"),
        r"the model fails on its inputs \(mat1 and mat2 shapes cannot be multiplied",
    ),
    "a lazy model": (
        ("model.builder=python:faulty:lazy", "model.args={}"),
        "parameter '1.weight' of model python:faulty:lazy has no shape yet; call the model once",
    ),
    "a model that cannot be copied": (
        ("model.builder=python:faulty:locked", "model.args={}"),
        r"the model cannot be copied \(cannot pickle '_thread.lock' object\); build it without what",
    ),
    "a model of other outputs": (
        ("model.builder=python:faulty:wide", "model.args={}", "regression.center_outputs=true"),
        "the model has 3 outputs and the data 10 targets",
    ),
    "a missing checkpoint": (("model.checkpoint=nowhere.pt",), "nowhere.pt"),
    "a text as a checkpoint": (("model.checkpoint=text.pt",), "text.pt"),
    "another model's checkpoint": (("model.checkpoint=other.pt",), "other.pt"),
    "an output that is not there": (("kernel.outputs=10",), "outputs is 10; allowed: 0 to 9"),
    "no such parameter": (("kernel.parameters=['conv*']",), "conv"),
    "gradients of jumps": (
        ("kernel.estimator=autodiff", "model.args={widths: [32], activation: sign}"),
        "the model jumps in its parameters",
    ),
    "differences as an average": (
        ("kernel.kind=averaged", "kernel.estimator=weight"),
        "gradients: auto, autodiff",
    ),
    "too little memory": (
        ("compute.memory_per_worker=100MiB",),
        r"needs .* GiB at its peak and may take 0.10 GiB \(.*\); make compute.tile smaller than 64, set compute.stderr",
    ),
    "too little memory for any tile": (
        ("compute.memory_per_worker=100MiB", "compute.tile=1", "compute.stderr=none"),
        r"worker\(s\)\); use fewer compute.workers or raise compute.memory_per_worker",
    ),
    "an unknown device": (("compute.device=tpu",), "auto, cpu, cuda"),
    "no GPU": (("compute.device=cuda",), "torch sees no GPU"),
    "no GPU to share": (("compute.workers_per_gpu=2", "compute.device=cpu"), "workers_per_gpu is 2, but the run is on"),
    "no worker on a GPU": (("compute.workers_per_gpu=0",), "workers_per_gpu is 0; allowed: a whole number, 1 or more"),
    "a run_dir that is a file": (("run_dir=file",), "'.*file' is a file, not a folder"),
    "a run_dir below a file": (("run_dir=file/run",), "is a file, not a folder"),
    "an unwritable run_dir": (("run_dir=/proc/run",), "cannot be written"),
    "an unknown scheme": (("run_dir=ftp://host/run",), "ftp"),
}


def assert_one_line(result, match):
    assert result.code == 2, result.err
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    assert re.search(match, lines[0]), lines[0]


@pytest.mark.parametrize(("sets", "match"), WRONG.values(), ids=WRONG)
def test_wrong_inputs_end_with_one_line_and_leave_no_trace(sets, match, folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = snapshot(folder)
    assert_one_line(run(folder / "run", *sets), match)
    after = snapshot(folder)
    assert after.pop("config.yaml")
    assert {path for path in after if "__pycache__" not in path} == before.keys()
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "no such configuration file.*did you mean 'config.yaml'"),
        ("", "the file is empty"),
        ("name: [", "not valid YAML"),
        ("- a\n- b", "a configuration is a mapping"),
        ("name: a\nrun_dir: run\nmodel: {builder: mlp}", "data is missing"),
        ("name: a\nname: b", "stands here twice"),
    ],
)
def test_wrong_files(text, match, tmp_path):
    (tmp_path / "config.yaml").write_text("name: right")
    wrong = tmp_path / "confg.yaml"
    if text is not None:
        wrong.write_text(text)
    for verb in ("run", "plan"):
        assert_one_line(nntk(verb, wrong), match)


@pytest.mark.parametrize("verb", ["status", "verify", "report"])
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "holds no run"),
        (b"not json", "is not valid JSON"),
        (b"[]", "is broken at"),
        (b"{}", "is broken at"),
        (b'{"schema_version": 99}', "schema version 99"),
    ],
)
def test_directories_without_a_run(verb, content, match, tmp_path):
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    before = snapshot(tmp_path)
    assert_one_line(nntk(verb, tmp_path), match)
    assert_one_line(nntk(verb, tmp_path / "nowhere"), "holds no run")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("section", ["layout", "sizes", "decision", "config"])
@pytest.mark.parametrize("damage", [{}, {"unheard": "of"}])
def test_a_manifest_that_is_not_whole(section, damage, own_run):
    path = own_run / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {section: damage}))
    before = snapshot(own_run)
    results = [nntk("status", own_run), nntk("verify", own_run), run(own_run), run(own_run, resume=True)]
    for result in results:
        assert_one_line(result, "manifest.json is broken at|configuration: ")
    assert snapshot(own_run) == before


def test_a_damaged_ledger(own_run):
    part = next((own_run / "ledger").iterdir())
    part.write_bytes(part.read_bytes()[:-50])
    assert_one_line(nntk("status", own_run), f"ledger file 'ledger/{part.name}'.*is damaged")
    assert_one_line(run(own_run, "spectrum.top_k=3", resume=True), "is damaged")


def test_a_model_that_fails_under_perturbation_names_the_cause(tmp_path, monkeypatch):
    """The failure occurs in a task: still one line, and `status` works on the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fragile.py").write_text(
        "import torch\n"
        "class Fragile(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x.flatten(1)) + torch.where(self.bias.abs().max() > 0.07, torch.nan, 0.0)\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    model = Fragile(64, 10)\n"
        "    torch.nn.init.zeros_(model.bias)\n"
        "    return model\n"
    )
    sets = ("model.builder=python:fragile:build", "model.args={}", "kernel.estimator=weight", "kernel.draws=64")
    result = run(tmp_path / "run", *sets)
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith("error: ")
    assert "NaN or infinity" in result.err
    assert "Traceback" not in result.err
    assert "features" in nntk("status", tmp_path / "run").out


@pytest.mark.process
def test_a_disk_that_fills_up(good_run, tmp_path):
    """Simulated: no file may grow beyond 24 KiB, which is enough for the manifest but not for features."""
    prelude = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (24 << 10, resource.RLIM_INFINITY))"
    driver = start(*arguments("run", tmp_path / "run"), prelude=prelude)
    _, err = driver.communicate(timeout=WAIT_SECONDS)
    assert driver.returncode == 2, err
    assert "Traceback" not in err
    assert re.search("error: train/features/.* cannot be written .*--resume$", err.splitlines()[-1])
    finished(tmp_path / "run", resume=True)
    assert_same_bits(good_run, tmp_path / "run")


@pytest.mark.process
def test_an_error_inside_a_ray_task_is_one_line_too(tmp_path):
    run_dir = finished(tmp_path / "run", "compute.tile=149")
    shard = run_dir / "kernel.zarr/train/gram/c/0/0"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    sets = ("compute.tile=149", "spectrum.top_k=3", "compute.executor=ray", "compute.workers=1")
    driver = start(*arguments("run", run_dir, *sets, resume=True))
    _, err = driver.communicate(timeout=WAIT_SECONDS)
    assert driver.returncode == 2, err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: ")
    assert "train/gram[0:149, 0:149]" in err
    assert "is damaged" in err


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments_", "match"),
    [(("run", "nowhere.yaml"), "no such configuration file"), (("verify", "nowhere"), "holds no run")],
)
def test_the_real_command_ends_the_same_way(arguments_, match, tmp_path):
    command = start(*(str(tmp_path / part) if part.startswith("nowhere") else part for part in arguments_))
    out, err = command.communicate(timeout=WAIT_SECONDS)
    assert (command.returncode, out) == (2, "")
    assert err.startswith("error: ")
    assert match in err
    assert len(err.splitlines()) == 1
