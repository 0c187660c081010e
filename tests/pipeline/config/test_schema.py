"""The configuration: what is accepted from files and overrides, and one clear line for each thing that is not."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from nntk_dist.errors import NNTKError
from pipeline.config.choices import ExecutorChoice, StandardErrorChoice
from pipeline.config.schema import Config, config_from_dict, load_config
from pipeline.records.manifest import fingerprint

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))

MINIMAL = """\
name: tiny
run_dir: runs/tiny
data: {source: "sklearn:digits"}
model: {builder: mlp}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(MINIMAL)
    return path


def refused(path: Path, *overrides: str) -> str:
    """The message with which the configuration is refused, after checking that it is one line."""
    with pytest.raises(NNTKError, match=r"\A[^\n]+\Z") as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_round_trip(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert config_from_dict(config.model_dump(mode="json")) == config
    assert yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))) == config.model_dump(mode="json")


def test_all_configs_are_shipped() -> None:
    names = [
        "cifar10",
        "digits",
        *("gpt2-logits", "gpt2-lora", "gpt2-loss"),
        "mnist",
        "mnist-factored",
        "mnist-full",
        "mnist-sign",
        "sign1d",
    ]
    assert sorted(path.stem for path in CONFIGS) == names


def test_defaults_are_those_of_the_contract(minimal: Path) -> None:
    assert load_config(minimal).model_dump(mode="json") == {
        "name": "tiny",
        "run_dir": "runs/tiny",
        "data": {"source": "sklearn:digits", "train": None, "test": None, "normalize": True, "seed": 0,
                 "input_columns": None, "target_column": None, "args": {}},
        "model": {"builder": "mlp", "args": {}, "seed": 0, "checkpoint": None, "output": None},
        "kernel": {
            "kind": "nonlocal",
            "weighting": {"name": "fixed", "temperature": 1.0, "per_example": False, "dimension": 16,
                          "reference": 256},
            "distribution": {"name": "gaussian", "gamma": 0.05, "gamma_scale": "absolute", "alpha": None,
                             "nu": None, "rank": None, "options": {}},
            "estimator": "auto", "variance_reduction": "auto", "statistic": "both", "design": "iid", "draws": "auto",
            "blocks": 8, "rtol": None, "max_draws": 65536, "parameters": ["*"], "group": None, "outputs": "trace",
            "scale": "localized", "seed": 0, "contraction": "auto", "sketch": "auto", "output_projections": "auto",
        },
        "compute": {
            "executor": "ray", "workers": "auto", "threads": "auto", "workers_per_gpu": 1, "device": "auto",
            "dtype": "float32", "tile": 1024, "batch": "auto", "memory_per_worker": "auto", "write_tiles": "auto",
            "stderr": "entry", "matmul_precision": "highest",
        },
        "spectrum": {"method": "auto", "args": {}, "top_k": 50},
        "regression": {
            "method": "auto", "args": {}, "tolerance": 1e-4, "ridge": [1e-4, 1e-3, 1e-2, 1e-1, 1.0],
            "center_outputs": False,
        },
        "report": {"plots": True},
        "stages": [],
    }  # fmt: skip


def test_config_is_frozen(minimal: Path) -> None:
    config = load_config(minimal)
    with pytest.raises(ValidationError, match="frozen"):
        config.kernel.blocks = 16


def test_numbers_in_every_notation_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "numbers.yaml"
    path.write_text(MINIMAL + "regression: {ridge: [1e-4, 1E-3, 1.e-2, .5, 2, +3.0e+1]}\nkernel: {max_draws: 65_536}\n")
    config = load_config(path)
    assert config.regression.ridge == (1e-4, 1e-3, 1e-2, 0.5, 2.0, 30.0)
    assert config.kernel.max_draws == 65536


def test_words_and_dates_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "words.yaml"
    path.write_text("{name: 2024-01-01, run_dir: no, data: {source: 'sklearn:digits'}, model: {builder: on}}")
    config = load_config(path)
    assert (config.name, config.run_dir, config.model.builder) == ("2024-01-01", "no", "on")


def test_merge_keys_and_anchors_work(tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    path.write_text(MINIMAL + "spectrum: &auto {method: auto}\nregression: {<<: *auto, center_outputs: true}\n")
    assert load_config(path).regression.center_outputs is True


# --- overrides ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "keys", "expected"),
    [
        ("kernel.distribution.gamma=1e-3", ("kernel", "distribution", "gamma"), 1e-3),
        ("kernel.distribution.gamma=2", ("kernel", "distribution", "gamma"), 2.0),
        ("data.source=idx:/data/my=folder", ("data", "source"), "idx:/data/my=folder"),
        ("data.train=null", ("data", "train"), None),
        ("data.input_columns=[a, b]", ("data", "input_columns"), ("a", "b")),
        ("compute.memory_per_worker=4GiB", ("compute", "memory_per_worker"), 4 * 2**30),
        ("compute.memory_per_worker=1000000", ("compute", "memory_per_worker"), 1000000),
        ("compute.device=cuda:3", ("compute", "device"), "cuda:3"),
        ("compute.write_tiles=true", ("compute", "write_tiles"), True),
        ("compute.write_tiles=false", ("compute", "write_tiles"), False),
        ("regression.method=iterative", ("regression", "method"), "iterative"),
        ("kernel.outputs=0", ("kernel", "outputs"), 0),
        ("kernel.outputs=full", ("kernel", "outputs"), "full"),
        ("kernel.parameters=weight", ("kernel", "parameters"), ("weight",)),
        ("kernel.parameters=['0.*', '*.bias']", ("kernel", "parameters"), ("0.*", "*.bias")),
        ("regression.ridge=[0.5]", ("regression", "ridge"), (0.5,)),
        ("regression.ridge.4=7", ("regression", "ridge"), (1e-4, 1e-3, 1e-2, 1e-1, 7.0)),
        ("model.args.widths=[8]", ("model", "args"), {"widths": [8]}),
        ("model.args.norm.name=batch", ("model", "args"), {"norm": {"name": "batch"}}),
    ],
)
def test_override_reaches_its_key(minimal: Path, override: str, keys: tuple[str, ...], expected: Any) -> None:
    value: Any = load_config(minimal, [override])
    for key in keys:
        value = getattr(value, key)
    assert value == expected
    assert type(value) is type(expected) or isinstance(value, int)


def test_overrides_apply_in_order_and_leave_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "wide.yaml"
    path.write_text(MINIMAL.replace("builder: mlp", "builder: mlp, args: {widths: [3, 4], activation: relu}"))
    config = load_config(path, ["model.args.widths.1=5", "model.args.widths.0=6", "model.args.widths.1=7"])
    assert config.model.args == {"widths": [6, 7], "activation": "relu"}


def test_override_supplies_what_the_file_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "partial.yaml"
    path.write_text("name: partial\nrun_dir: runs/partial\nmodel: {builder: mlp}\n")
    assert load_config(path, ["data.source=synthetic:sign"]).data.source == "synthetic:sign"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kernel.blocks", r"--set kernel.blocks: expected KEY=VALUE with a dotted key"),
        ("=3", r"--set =3: expected KEY=VALUE"),
        ("kernel..blocks=8", r"expected KEY=VALUE"),
        (
            "kernel.bloks=8",
            r"=8: unknown key kernel.bloks; allowed in kernel: kind, .*did you mean 'blocks'\?",
        ),
        ("kernle.blocks=8", r"unknown key kernle; allowed: name, run_dir, .*did you mean 'kernel'\?"),
        ("kernel.distribution.gama=1", r"unknown key kernel.distribution.gama; .*did you mean 'gamma'\?"),
        ("regression.ridge.5=1", r"regression.ridge is a list of 5; allowed in place of '5': an index from 0"),
        ("regression.ridge.last=1", r"regression.ridge is a list of 5; allowed in place of 'last'"),
        ("name.first=x", r"--set name.first=x: name is 'tiny', a single value: it has no key 'first' below it"),
        ("kernel.blocks.x=1", r"kernel.blocks is 8, a single value"),
        ("kernel.parameters=*", r"--set kernel.parameters=\*: line 1: not valid YAML: .*in quotes$"),
        ("kernel.parameters=[a", r"line 1: not valid YAML: "),
        ("kernel.blocks=3", r"--set kernel.blocks=3: kernel.blocks is 3; allowed: 4 or more, which"),
        ("kernel={bloks: 8}", r"--set kernel={bloks: 8}: unknown key kernel.bloks"),
        ("name=", r"--set name=: name is null; allowed: "),
    ],
)
def test_bad_override_is_refused_in_one_line(minimal: Path, override: str, message: str) -> None:
    assert re.search(message, refused(minimal, override))


def test_a_fault_of_the_file_is_not_blamed_on_an_override(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "kernel: {blocks: 3}\n")
    assert refused(minimal, "kernel.seed=1").startswith(f"{minimal}: kernel.blocks is 3")


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("- a\n- b\n", r"the file holds \['a', 'b'\]; a configuration is a mapping"),
        ("just words", "the file holds 'just words'; a configuration is a mapping"),
        ("name: a\nkernel: {kind: [\n", r"line 3: not valid YAML"),
        ("name: a\nname: b\n", r"line 2: not valid YAML: the key 'name' stands here twice"),
        (MINIMAL + "kernel:\n  seed: 1\n  seed: 2\n", r"line 7: not valid YAML: the key 'seed' stands here twice"),
        ("name: a\n---\nname: b\n", r"line 2: not valid YAML: but found another document"),
        ("name: !!python/object:os.system x\n", r"line 1: not valid YAML: could not determine a constructor"),
        ("name: a\x00b\n", r"not valid YAML: "),
        ("? [a, b]\n: 1\n", r"line 1: not valid YAML: a key that is not text"),
        ("1: a\n" + MINIMAL, r"line 1: not valid YAML: a key that is not text"),
    ],
)
def test_malformed_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    found = refused(path)
    assert found.startswith(f"{path}: ")
    assert re.search(message, found)


def test_missing_file_names_its_nearest_neighbour(minimal: Path) -> None:
    wanted = minimal.with_name("tinny.yaml")
    assert refused(wanted) == f"{wanted}: no such configuration file; did you mean 'tiny.yaml'?"
    assert refused(minimal.parent / "none" / "x.yaml").endswith("x.yaml: no such configuration file")


def test_folder_file_as_folder_and_binary_are_refused(minimal: Path) -> None:
    assert "this is a folder; name a configuration file in it" in refused(minimal.parent)
    assert "cannot be read: Not a directory" in refused(minimal / "x.yaml")
    minimal.write_bytes(b"\xff\xfe\x00name")
    assert "this is not UTF-8 text" in refused(minimal)


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kernel.kind=nonlokal", r"'nonlokal'; allowed: nonlocal, covariance, .*did you mean 'nonlocal'\?$"),
        ("kernel.distribution.name=cauchy", "name is 'cauchy'; allowed: gaussian, sphere, ball"),
        ("kernel.distribution.gamma_scale=relativ", r"allowed: absolute, relative; did you mean 'relative'\?"),
        ("kernel.distribution={name: student, nu: 2}", "distribution.nu is 2; allowed: a number above 2, for distrib"),
        ("kernel.distribution={name: fractional, alpha: 1}", "alpha is 1; allowed: a number from 0 to below 1"),
        ("kernel.distribution={name: lowrank, rank: 0}", "rank is 0; allowed: a whole number, 1 or more"),
        ("kernel.distribution.nu=4", "distribution.nu is 4.0, but it is an option of student; .* gaussian: none"),
        ("kernel={kind: averaged, distribution: {name: lowrank}}", "kernel.distribution is 'lowrank', .*: gaussian, "),
        ("kernel={estimator: autodiff, distribution: {name: lowrank}}", "kernel.estimator is .* radial: auto, weight"),
        ("kernel={design: orthogonal, distribution: {name: lowrank}}", "kernel.design is .*: iid, antithetic"),
        ("kernel={kind: covariance, distribution: {gamma_scale: relative}}", "gamma_scale is .*: absolute"),
        ("kernel={design: orthogonal, blocks: 1}", "kernel.statistic is 'both'; allowed for blocks 1: plugin"),
        ("kernel={design: orthogonal, blocks: 0, statistic: plugin}", "kernel.blocks is 0; allowed: a whole number"),
        ("kernel.weighting.name=atention", "'atention'.*; allowed: fixed, parameter, output, loss, python:module"),
        ("kernel.weighting.temperature=.nan", "kernel.weighting.temperature is nan; allowed: a number above 0, or"),
        ("kernel.weighting.reference=all", "kernel.weighting.reference is 'all'; allowed: a whole number, 1 or more$"),
        ("kernel.weighting.per_example=yes", "kernel.weighting.per_example is 'yes'; allowed: true or false$"),
        ("kernel.estimator=exact", "kernel.estimator is 'exact'; allowed: auto, weight, autodiff, activation"),
        ("kernel.design=qmc", "kernel.design is 'qmc'; allowed: iid, antithetic, orthogonal"),
        ("kernel.rtol=1", "kernel.rtol is 1; allowed: null, or a number above 0 and below 1, such as 0.05$"),
        ("kernel.blocks=2", r"kernel.blocks is 2; allowed: 4 or more, which .* \(1 or more .* orthogonal"),
        ("kernel.distribution.gamma=0", "kernel.distribution.gamma is 0; allowed: a number above 0"),
        ("kernel.distribution.gamma=.nan", "kernel.distribution.gamma is nan; allowed: a number above 0"),
        ("kernel.distribution.gamma=.inf", "kernel.distribution.gamma is inf; allowed: a number above 0"),
        ("kernel.draws=lots", "kernel.draws is 'lots'; allowed: auto, or a whole number, 1 or more$"),
        ("kernel.draws=atuo", r"kernel.draws is 'atuo'; allowed: auto, or .*; did you mean 'auto'\?"),
        ("kernel.draws=0", "kernel.draws is 0; allowed: auto, or a whole number, 1 or more"),
        ("kernel.draws=1.5", "kernel.draws is 1.5; allowed"),
        ("kernel.outputs=-1", "kernel.outputs is -1; allowed: trace, full, or the index of one output"),
        ("kernel.outputs=tracee", r"kernel.outputs is 'tracee'; .*did you mean 'trace'\?"),
        ("kernel.parameters=[]", r"kernel.parameters is \[\]; allowed: a list of one or more name patterns"),
        ("kernel.parameters=[1]", r"kernel.parameters is \[1\]; allowed: a list of one or more name patterns"),
        ("kernel.seed=-1", "kernel.seed is -1; allowed: a whole number from 0 to 2.63 - 1"),
        ("kernel.seed=9223372036854775808", "allowed: a whole number from 0 to 2.63 - 1"),
        ("kernel=null", "kernel is null; allowed: a mapping with the keys kind, distribution"),
        ("data.train=0", "data.train is 0; allowed: a whole number, 1 or more, or null"),
        ("data.train='100'", "data.train is '100'; allowed: a whole number"),
        ("data.train=true", "data.train is true; allowed: a whole number"),
        ("data.normalize=1", "data.normalize is 1; allowed: true or false"),
        ("data.source=''", "data.source is ''; allowed: KIND:PLACE"),
        ("model.args=[1]", r"model.args is \[1\]; allowed: a mapping of the builder's own arguments"),
        ("compute.workers=0", "compute.workers is 0; allowed: auto, or a whole number, 1 or more"),
        ("compute.device=gpu", "compute.device is 'gpu'; allowed: auto, cpu, cuda, cuda:N"),
        ("compute.dtype=float16", r"allowed: float32, float64; did you mean 'float\d\d'\?"),
        ("compute.memory_per_worker=much", "compute.memory_per_worker is 'much'; allowed: auto, or bytes"),
        ("compute.memory_per_worker=0", "compute.memory_per_worker is 0; allowed: auto, or bytes"),
        ("compute.memory_per_worker=-5", "compute.memory_per_worker is -5; allowed: auto, or bytes"),
        ("compute.tile=0", "compute.tile is 0; allowed: a whole number, 1 or more"),
        ("compute.stderr=all", "compute.stderr is 'all', not available in this version; allowed: entry, sample, none"),
        ("compute.write_tiles=no way", "compute.write_tiles is 'no way'; allowed: auto, true, or false"),
        ("compute.write_tiles=1", "compute.write_tiles is 1; allowed: auto, true, or false"),
        ("spectrum.method=lanczos", "spectrum.method is 'lanczos'; allowed: auto, dense, factored, iterative, python:"),
        ("regression.method=cg", "regression.method is 'cg'; allowed: auto, dense, factored, iterative, python:module"),
        ("regression.ridge=[]", r"regression.ridge is \[\]; allowed: a list of one or more numbers above 0"),
        ("regression.ridge.2=-1", "regression.ridge.2 is -1; allowed: a list of one or more numbers above 0"),
        ("regression.ridge=1", "regression.ridge is 1; allowed: a list of one or more numbers above 0"),
        ("regression.select=gcv", "unknown key regression.select; allowed in regression: method, args, tolerance"),
        ("report.plots=maybe", "report.plots is 'maybe'; allowed: true or false, or a list"),
    ],
)  # fmt: skip
def test_value_out_of_range_is_refused_with_what_is_allowed(minimal: Path, override: str, message: str) -> None:
    found = refused(minimal, override)
    assert found.startswith(f"--set {override}: ")
    assert re.search(message, found)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["kernel.draws=100"],
            "kernel.draws is 100, which does not fill 8 blocks .*the nearest: 96 or 104$",
        ),
        (["kernel.draws=5"], "multiple of 8, the nearest: 8$"),
        (
            ["kernel.draws=24", "kernel.design=antithetic"],
            "design antithetic.; allowed: auto, or a multiple of 16, the nearest: 16 or 32$",
        ),
        (
            ["kernel.kind=covariance", "kernel.estimator=autodiff"],
            "uses differences of outputs: auto, weight$",
        ),
        (["kernel.kind=averaged", "kernel.estimator=weight"], "uses gradients: auto, autodiff$"),
        (["kernel.kind=local", "kernel.estimator=weight"], "uses gradients: auto, autodiff$"),
    ],
)
def test_values_that_do_not_go_together_are_refused(minimal: Path, overrides: list[str], message: str) -> None:
    assert re.search(message, refused(minimal, *overrides))


def test_values_that_go_together_are_accepted(minimal: Path) -> None:
    assert load_config(minimal, ["kernel.draws=32", "kernel.design=antithetic"]).kernel.draws == 32
    assert load_config(minimal, ["kernel.kind=covariance", "kernel.estimator=weight"]).kernel.estimator == "weight"
    # The local kernel draws nothing, so its number of draws does not matter.
    assert load_config(minimal, ["kernel.kind=local", "kernel.draws=5"]).kernel.draws == 5


@pytest.mark.parametrize("temperature", [".inf", "null"])
def test_an_infinite_temperature_is_kept_as_json_has_it(minimal: Path, temperature: str) -> None:
    config = load_config(minimal, ["kernel.weighting.name=loss", f"kernel.weighting.temperature={temperature}"])
    assert config.kernel.weighting.temperature is None
    assert config_from_dict(json.loads(config.model_dump_json())) == config
    assert config.kernel.weighting.weighting().tau == float("inf")


def test_missing_and_unknown_keys_are_named(minimal: Path) -> None:
    minimal.write_text("name: a\nrun_dir: b\nmodel: {builder: mlp}\n")
    assert "data is missing; allowed: a mapping with the keys source, train" in refused(minimal)
    minimal.write_text("name: a\nrun_dir: b\ndata: {train: 3}\nmodel: {builder: mlp}\n")
    assert "data.source is missing; allowed: KIND:PLACE" in refused(minimal)
    minimal.write_text("nam: a\nrun_dir: b\ndata: {source: x}\nmodel: {builder: mlp}\n")
    assert re.search(r"unknown key nam; allowed: name, .*did you mean 'name'\? \(and 1 more\)$", refused(minimal))


def test_long_values_are_shortened_to_one_line(minimal: Path) -> None:
    message = refused(minimal, f"compute.device='{'x' * 500}'")
    assert "xxx...;" in message.partition(": ")[2]


def test_plain_mappings_are_refused_alike() -> None:
    with pytest.raises(NNTKError, match=r"^configuration: name is missing; allowed: a name for the run"):
        config_from_dict({"run_dir": "b", "data": {"source": "x"}, "model": {"builder": "mlp"}})


def test_every_field_says_what_is_allowed() -> None:
    """No key can be refused with an empty list of allowed values."""

    def check(section: Any, prefix: str) -> int:
        count = 0
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                count += check(field.annotation, f"{prefix}{name}.")
            else:
                assert field.description or re.search("Literal|enum", repr(field.annotation)), prefix + name
                count += 1
        return count

    assert check(Config, "") > 40


def test_choices_are_enums_that_serialise_and_count_as_their_text(minimal: Path) -> None:
    config = load_config(minimal, ["compute.executor=serial", "compute.stderr=sample"])
    assert config.compute.executor is ExecutorChoice.SERIAL
    assert config.compute.stderr is StandardErrorChoice.SAMPLE
    plain = config.model_dump(mode="json")["compute"]
    assert type(plain["executor"]) is type(plain["stderr"]) is str
    assert yaml.safe_load(yaml.safe_dump(plain)) == json.loads(json.dumps(plain)) == plain
    assert pickle.loads(pickle.dumps(config)) == config == config_from_dict(config.model_dump(mode="json"))
    assert fingerprint({"stderr": StandardErrorChoice.SAMPLE}) == fingerprint({"stderr": "sample"})
