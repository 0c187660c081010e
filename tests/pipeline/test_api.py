"""Running and planning from Python: the same as the command line, and errors that name what the caller wrote."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml

import pipeline
from nntk_dist import ArgumentError, StoreError, open_kernel
from pipeline import plan, run
from tests.pipeline.tools import config_file


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, its configuration and the result of `run`."""
    folder = tmp_path_factory.mktemp("api") / "run"
    config = config_file(folder)
    return config, folder, run(config, {"run_dir": str(folder)}, progress=False)


def test_run_returns_the_stored_kernel(finished):
    config, folder, kernel = finished
    assert kernel.complete
    assert kernel.manifest["config"]["run_dir"] == str(folder)
    np.testing.assert_array_equal(kernel.gram[...], open_kernel(folder).gram[...])
    again = run(config, {"run_dir": str(folder)}, progress=False)  # is only opened
    assert again.manifest["completed"] == kernel.manifest["completed"]


def test_a_mapping_is_a_configuration(finished, capsys):
    config, folder, kernel = finished
    document = yaml.safe_load(config.read_text())
    assert run(document, {"run_dir": str(folder)}).manifest == kernel.manifest
    assert capsys.readouterr() == ("", "")


@pytest.mark.process
def test_a_changed_section_asks_for_resume_and_then_reruns_its_stage_alone(finished, tmp_path):
    config, _, _ = finished
    overrides: dict[str, object] = {"run_dir": str(tmp_path / "again")}
    before = run(config, overrides, progress=False)
    overrides["regression.ridge"] = [0.5]
    with pytest.raises(StoreError, match=r"in Python resume=True\) reruns only regression"):
        run(config, overrides, progress=False)
    after = run(config, overrides, resume=True, progress=False)
    assert list(after.regression["ridge"]) == [0.5]
    assert after.manifest["stages"]["gram"] == before.manifest["stages"]["gram"]


@pytest.mark.process
def test_progress_goes_to_standard_error(tmp_path, capsys):
    run(config_file(tmp_path / "run"), {"run_dir": str(tmp_path / "run")})
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"gram: finished, \d+/\d+ \(100 %\)", err)


def test_a_plan_is_short_and_writes_nothing(finished, tmp_path):
    config, _, _ = finished
    planned = plan(config, {"run_dir": str(tmp_path / "new")})
    assert re.fullmatch(
        r"Plan\('.*', nonlocal kernel by \w+, \d+ train and \d+ test rows, .* a worker\)", repr(planned)
    )
    assert planned.job.sizes.num_train > 0
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"kernel.gama": 1}, r"^override kernel\.gama: unknown key kernel\.gama; allowed in kernel: .*"),
        ({"kernel.draws": "x"}, r"^override kernel\.draws: kernel\.draws is 'x'; allowed: auto, or a whole number"),
        ({"kernel..draws": 8}, r"^override kernel\.\.draws: expected KEY=VALUE with a dotted key"),
        ({"model.args.widths.7": 8}, r"^override model\.args\.widths\.7: model\.args\.widths is a list of"),
    ],
)
def test_wrong_overrides_are_named_as_the_caller_wrote_them(finished, overrides, message):
    with pytest.raises(ArgumentError, match=message):
        plan(finished[0], overrides)


def test_tables_of_a_run_are_data_frames(finished):
    _, _, kernel = finished
    assert kernel.tables == ("eigenvalues", "eigenvectors", "predictions", "regression")
    values = np.linalg.eigvalsh(kernel.gram[...].astype(np.float64))[::-1]
    np.testing.assert_allclose(kernel.spectrum["eigenvalue"], values, rtol=1e-4, atol=1e-5 * values[0])
    assert list(kernel.predictions["id"]) == list(kernel.test_ids[...])
    assert kernel.regression["selected"].sum() == 1
    with pytest.raises(StoreError, match=r"no table 'regresion'; did you mean 'regression'\?; it holds: eigenvalues, "):
        kernel.table("regresion")


def test_a_damaged_table_is_an_error_of_the_store(finished, tmp_path):
    kernel = open_kernel(shutil.copytree(finished[1], tmp_path / "run"))
    (tmp_path / "run" / "tables" / "regression.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(StoreError, match=r"the table 'regression' .* cannot be read .* 'nntk verify'"):
        _ = kernel.regression


def test_importing_the_package_imports_no_ray():
    code = "import sys, pipeline; assert not {'ray', 'torch', 'nntk_dist'} & set(sys.modules); print(pipeline.__all__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    with pytest.raises(AttributeError, match="has no attribute 'sweeep'"):
        _ = pipeline.sweeep
