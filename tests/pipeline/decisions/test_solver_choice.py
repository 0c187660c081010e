"""Spectrum and regression by every method, with tiles and without: the same numbers, resumed and verified; refusals."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

import pipeline.planning.plan
import pipeline.work.stages
from nntk_dist import open_kernel
from nntk_dist.analysis import BlockKrylov, ConjugateGradients
from nntk_dist.analysis.regression.leave_one_out import sampled_examples, unit_vectors
from nntk_dist.errors import NNTKError
from nntk_dist.products.factor_form import FactorForm
from pipeline.decisions.solver_choice import choose_solver
from pipeline.decisions.stored_run import stored_job
from pipeline.records.manifest import read_manifest
from pipeline.storage.run_storage import RunStorage
from tests.harness.grids import all_but
from tests.pipeline.tools import arguments, arrays, assert_same_bits, finished, ledger, nntk, run

RIDGES = "regression.ridge=[0.01, 0.1, 1.0]"
KERNELS = {
    "weight": ("kernel.estimator=weight", "kernel.draws=32"),
    "sketch": ("kernel.contraction=sketch", "kernel.sketch=64", "kernel.outputs=2"),
    "full": ("kernel.estimator=weight", "kernel.draws=32", "kernel.outputs=full", "data.train=23", "data.test=7"),
    "local": ("kernel.kind=local", "kernel.sketch=64"),
    "covariance": ("kernel.kind=covariance", "kernel.draws=64", "regression.center_outputs=true"),
}


def methods(name):
    return f"spectrum.method={name}", f"regression.method={name}"


def table(run_dir, name):
    columns = pq.read_table(run_dir / f"tables/{name}.parquet").to_pydict()
    return {key: np.array(values) for key, values in columns.items()}


def results(run_dir):
    return json.loads((run_dir / "manifest.json").read_text())["results"]


@pytest.fixture(scope="module", params=all_but(["weight"], {name: name for name in KERNELS}, pytest.mark.process))
def dense_run(request, tmp_path_factory):
    """A finished run by the dense method, its kernel's name and its settings."""
    sets = (*KERNELS[request.param], RIDGES)
    return finished(tmp_path_factory.mktemp("dense") / "run", *sets, *methods("dense")), request.param, sets


def test_the_factor_gives_the_numbers_of_the_dense_form(dense_run, tmp_path):
    """Tiles are rounded to float32, 6e-8 of an entry; the least ridge is 1e-2 of the diagonal."""
    dense, name, sets = dense_run
    factored = finished(tmp_path / "run", *sets, *methods("factored"))
    assert_same_bits(dense, factored)
    expected, found = table(dense, "regression"), table(factored, "regression")
    # The dense form multiplies the factor again, in float64; for `covariance` it is too wide, and tiles have float32.
    tolerance = 1e-3 if name == "covariance" else 1e-6
    assert (expected.pop("rounding_error").max() < 1e-8) == (name != "covariance")
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(found[key], values, rtol=tolerance, err_msg=key)
    scores, others = table(factored, "predictions"), table(dense, "predictions")
    for key, values in others.items():
        np.testing.assert_allclose(
            scores[key], values, rtol=0, atol=tolerance * max(1, np.abs(values).max()), err_msg=key
        )
    compare_spectra(table(dense, "eigenvalues"), table(factored, "eigenvalues"), name)
    assert results(factored)["spectrum_method"] == results(factored)["regression_method"] == "factored"
    assert "spectrum_method" not in results(dense)
    vectors, others = table(factored, "eigenvectors"), table(dense, "eigenvectors")
    np.testing.assert_allclose(np.abs(vectors["vector_0"] @ others["vector_0"]), 1.0, rtol=1e-6)


def compare_spectra(expected, found, name):
    """Zeros beyond the factor's rank are not listed; `unbiased` is listed if features are differences."""
    both = name in ("weight", "full")
    assert set(found) == {"index", "eigenvalue"} | ({"eigenvalue_unbiased"} if both else set())
    for key in set(found) - {"index"}:
        values = found[key][np.isfinite(found[key])]
        every = np.sort(np.concatenate([values, np.zeros(len(expected[key]) - len(values))]))[::-1]
        np.testing.assert_allclose(every, expected[key], rtol=0, atol=1e-6 * expected[key][0], err_msg=key)


def test_passes_over_tiles_give_the_numbers_of_the_dense_form(dense_run, tmp_path):
    dense, name, sets = dense_run
    iterative = finished(tmp_path / "run", *sets, *methods("iterative"), "regression.tolerance=1e-6")
    expected, found = table(dense, "regression"), table(iterative, "regression")
    for key in ("train_error", "test_error", "test_accuracy", "absolute_ridge"):
        if expected[key].dtype.kind == "f":
            np.testing.assert_allclose(found[key], expected[key], rtol=1e-4, err_msg=key)
    assert (found["solve_residual"] <= 1e-6).all()
    # Student's quantile of 1e-4 over 12 rows, eight sampled examples or more.
    sampled = 8 if name == "full" else 32
    allowed = stats.t.isf(1e-4 / 24, sampled - 1) * found["loo_stderr"]
    assert (np.abs(found["loo_error"] - expected["loo_error"]) < allowed).all()
    assert found["loo_stderr"][1] < 0.6 * found["loo_error"][1]
    spectrum, whole = table(iterative, "eigenvalues"), table(dense, "eigenvalues")
    for key in [each for each in whole if each.startswith("eigenvalue")]:
        assert len(spectrum[key]) == 5
        np.testing.assert_allclose(spectrum[key], whole[key][:5], rtol=1e-8, atol=1e-8 * whole[key][0])
    reached = results(iterative)
    assert reached["spectrum_converged"]
    assert reached["regression_converged"]
    assert reached["rounding_error"] > 1e-8  # tiles have float32
    assert reached["spectrum_passes"] >= 1
    page = (iterative / "report/index.html").read_text()
    assert "exactly for a sample of them, which gives an estimate with its standard error" in page
    assert "needs all eigenvalues" in page
    assert "solved iteratively in" in page


@pytest.mark.process
@pytest.mark.parametrize("name", ["weight", "sketch"])
def test_a_run_without_tiles(name, tmp_path):
    sets = (*KERNELS[name], RIDGES)
    with_tiles = finished(tmp_path / "tiles", *sets, *methods("factored"))
    without = finished(tmp_path / "none", *sets, "compute.write_tiles=false")
    left, right = arrays(with_tiles), arrays(without)
    assert not any("gram" in path for path in right)
    assert {path for path in left if "gram" not in path} == set(right)
    assert [path for path in right if left[path].tobytes() != right[path].tobytes()] == []
    for kind in ("regression", "predictions", "eigenvalues", "eigenvectors"):
        np.testing.assert_equal(table(without, kind), table(with_tiles, kind))
    assert "train/0/0" not in {tile for stage, tile in ledger(without) if stage == "gram"}

    found, expected = results(without), results(with_tiles)
    assert found["train_relative_error"] == expected["train_relative_error"]
    # The sample has 4,096 of 22,201 entries, and holds few of the diagonal ones, whose bias is larger.
    assert found["train_relative_bias"] == pytest.approx(expected["train_relative_bias"], rel=0.5)
    projection = json.loads((without / "manifest.json").read_text())["projection"]
    assert sum(projection["disk_bytes"].values()) == sum(values.nbytes for values in right.values())
    assert "gram" not in projection["disk_bytes"]
    assert "Spectrum: exact, from the kernel" in (without / "report/index.html").read_text()

    checked = nntk("verify", without, "--recompute", 100)
    assert checked.code == 0, checked.out
    assert "no tiles are stored" in checked.out
    count = sum(stage in ("features", "metric", "test") for stage, _ in ledger(without))
    assert f"{count} of {count} recomputed tiles have the same bits" in checked.out
    state = nntk("status", without)
    assert "gram" not in {line.split()[0] for line in state.out.splitlines()[1:]}

    kernel = open_kernel(without)
    assert kernel.complete
    assert not kernel.has_tiles
    with pytest.raises(NNTKError, match=r"holds no 'train/gram': it was run with .*factor\(\) gives Φ and M"):
        _ = kernel.gram
    features, metric = kernel.factor()
    vectors = np.random.default_rng(0).standard_normal((len(features), 3))
    expected_product = features @ (metric @ (features.T @ vectors))
    np.testing.assert_allclose(
        kernel.linear_operator() @ vectors, expected_product, rtol=0, atol=1e-12 * np.abs(expected_product).max()
    )
    gram = left["train/gram"].astype(np.float64)
    np.testing.assert_allclose(features @ metric @ features.T, gram, rtol=0, atol=2e-5 * np.abs(gram).max())


@pytest.mark.process
def test_damaged_features_of_a_run_without_tiles_are_found_and_done_again(tmp_path):
    run_dir = finished(tmp_path / "run", *KERNELS["weight"], "compute.write_tiles=false")
    shard = next(path for path in (run_dir / "kernel.zarr/train/features/c").rglob("*") if path.is_file())
    content = shard.read_bytes()
    shard.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    result = nntk("verify", run_dir, "--forget")
    assert result.code == 1
    assert "finiteness: FAILED cannot be checked" in result.out
    finished(run_dir, *KERNELS["weight"], "compute.write_tiles=false", resume=True)
    assert shard.read_bytes() == content
    assert nntk("verify", run_dir).code == 0


@pytest.mark.process
@pytest.mark.parametrize("stage", ["spectrum", "regression"])
@pytest.mark.parametrize(
    ("method", "place"),
    [
        ("factored", "nntk_dist.analysis.spectra.factored.kernel_spectrum"),
        ("iterative", "nntk_dist.analysis.streamed_kernel.StreamedKernel.product_and_norm"),
    ],
)
def test_a_solve_that_was_stopped_is_done_again(stage, method, place, tmp_path, monkeypatch):
    """Stopped partway through the solver's work; the tables are the same as without the stop."""
    sets = (*KERNELS["weight"], f"{stage}.method={method}")
    if (stage, method) == ("regression", "factored"):
        place = "nntk_dist.analysis.regression.factored._left_out"
    whole = finished(tmp_path / "whole", *sets)

    def stop(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, stop)
    assert run(tmp_path / "stopped", *sets).code == 130
    assert stage not in {name for name, _ in ledger(tmp_path / "stopped")}
    monkeypatch.undo()
    finished(tmp_path / "stopped", *sets, resume=True)
    for name in ("eigenvalues", "regression", "predictions"):
        np.testing.assert_equal(table(tmp_path / "stopped", name), table(whole, name))


def test_another_method_reruns_its_stage_alone(tmp_path, shared_run):
    run_dir = shutil.copytree(shared_run(*KERNELS["weight"]), tmp_path / "run")
    before = ledger(run_dir)
    finished(run_dir, *KERNELS["weight"], "regression.method=factored", resume=True)
    after = ledger(run_dir)
    assert {key[0] for key in before if before[key] != after[key]} == {"regression"}


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        pytest.param(
            ("compute.write_tiles=false",),
            "compute.write_tiles is false, but this kernel has no factor to use instead",
            marks=pytest.mark.process,
        ),
        (
            (*KERNELS["weight"], "kernel.statistic=unbiased", "compute.write_tiles=false"),
            "unless statistic is unbiased; set compute.write_tiles to auto or true",
        ),
        pytest.param(
            ("spectrum.method=factored",),
            "spectrum.method is 'factored', but this run stores no factor",
            marks=pytest.mark.process,
        ),
        (
            (*KERNELS["weight"], "compute.write_tiles=false", "regression.method=iterative"),
            "regression.method is 'iterative', which reads tiles, and compute.write_tiles is false",
        ),
    ],
)
def test_refusals(sets, message, tmp_path):
    for verb in ("plan", "run"):
        result = nntk(*arguments(verb, tmp_path / "run", *sets))
        assert result.code == 2
        assert message in result.err
    assert not (tmp_path / "run").exists()


def test_tiles_are_part_of_the_layout(tmp_path, shared_run):
    run_dir = shutil.copytree(shared_run(*KERNELS["weight"]), tmp_path / "run")
    result = run(run_dir, *KERNELS["weight"], "compute.write_tiles=false", resume=True)
    assert result.code == 2
    assert "was laid out with compute.write_tiles True, the configuration says False" in result.err
    assert run(run_dir, *KERNELS["weight"], "compute.write_tiles=true").code == 0


def test_auto_leaves_out_tiles_for_which_the_disk_has_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.planning.plan, "free_disk", lambda storage: (600_000, tmp_path))
    planned = nntk(*arguments("plan", tmp_path / "run", *KERNELS["weight"]))
    assert planned.code == 0, planned.err
    text = " ".join(planned.out.split())
    assert "tiles: none are written, they do not fit on the disk; later stages use the factor" in text
    assert "spectrum: factored, since no tiles are written" in text
    assert "regression: factored, since no tiles are written" in text
    refused = nntk(*arguments("plan", tmp_path / "run", "kernel.draws=8"))
    assert refused.code == 2
    assert "the arrays take" in refused.err


@pytest.mark.process
def test_the_choice_of_a_method(tmp_path, shared_run):
    """By the number of rows and the factor's width, on any machine."""
    job = stored_job(read_manifest(RunStorage(shared_run(*KERNELS["weight"]))))

    def chosen(rows, width):
        factor = None if width is None else FactorForm(("draw", "output"), (width, 1), False)
        return choose_solver(replace(job, sizes=replace(job.sizes, num_train=rows)), "regression", factor)

    assert chosen(4096, 100).text == "dense, for 4,096 kernel rows, 4,096 or fewer"
    assert chosen(4097, 4096).text == "factored, exact from 4,096 columns for 4,097 kernel rows"
    assert chosen(5000, 5000).text == "dense, for 5,000 kernel rows, 10,000 or fewer, without a narrow factor"
    assert chosen(10_000, None).name == "dense"
    assert chosen(10_001, None).text == "iterative, for 10,001 kernel rows, more than 10,000, without a narrow factor"
    planned = nntk(*arguments("plan", tmp_path / "other"))
    assert "spectrum: dense, for 149 kernel rows" in " ".join(planned.out.split())


@pytest.mark.parametrize("width", [1, 10, 100])
def test_columns_for_leave_one_out_are_counted_as_they_are_solved(width):
    solver = ConjugateGradients()
    sampled = sampled_examples(np.ones((90, width, 1)), solver.num_sampled // width, 0).examples
    assert solver.num_unit_columns(90 * width, width) == unit_vectors(90 * width, sampled, width).shape[1]


def test_the_choice_is_kept_and_read_by_the_stages(tmp_path, monkeypatch):
    """Chosen once, by the plan: the manifest holds it, and no stage chooses."""
    sets = ("spectrum.method=iterative", "spectrum.args={tolerance: 1e-3}")
    run_dir = finished(tmp_path / "run", *sets)
    kept = json.loads((run_dir / "manifest.json").read_text())["solvers"]
    assert kept["spectrum"] == {
        "name": "iterative",
        "reason": "as asked",
        "arguments": {"tolerance": 1e-3},
        "columns": None,
    }
    assert kept["regression"]["name"] == "dense"
    job = stored_job(read_manifest(RunStorage(run_dir)))
    assert job.solvers["spectrum"].spectrum_solver() == BlockKrylov(tolerance=1e-3)
    found = table(run_dir, "eigenvalues")
    assert 1e-6 * found["eigenvalue"][0] < found["residual"].max() <= 1e-3 * found["eigenvalue"][0]


SOLVERS = """
from dataclasses import dataclass
from nntk_dist.analysis import Cost, DenseRidge, DenseSpectrum, Needs, Spectrum

@dataclass(frozen=True)
class Halved:
    factor: float = 0.5
    needs = Needs.TILES

    def cost(self, size):
        return Cost(memory_bytes=8 * size.kernel.num_rows**2, operations=1e6, read_bytes=0.0)

    def solve(self, kernel, *, top_k, vectors=True, seed=0):
        found = DenseSpectrum().solve(kernel, top_k=top_k, vectors=vectors)
        return Spectrum(self.factor * found.eigenvalues, found.eigenvectors)

class Ridge(DenseRidge):
    pass
"""


def test_solvers_of_a_users_module(good_run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_solvers.py").write_text(SOLVERS)
    own = ("spectrum.method=python:my_solvers:Halved", "regression.method=python:my_solvers:Ridge")
    run_dir = finished(tmp_path / "run", *own, "spectrum.args.factor=0.25")
    halved, whole = table(run_dir, "eigenvalues"), table(good_run, "eigenvalues")
    np.testing.assert_array_equal(halved["eigenvalue"], 0.25 * whole["eigenvalue"])
    np.testing.assert_equal(table(run_dir, "regression"), table(good_run, "regression"))
    assert results(run_dir)["spectrum_method"] == "python:my_solvers:Halved"
    planned = nntk(*arguments("plan", tmp_path / "other", *own))
    assert "spectrum: python:my_solvers:Halved, as asked" in " ".join(planned.out.split())
    wrong = nntk(*arguments("plan", tmp_path / "other", *own, "spectrum.args.fctor=2"))
    assert wrong.code == 2
    assert "takes no argument 'fctor'; allowed: factor; did you mean 'factor'?" in wrong.err
