"""The scikit-learn estimators: their conventions, and their predictions against the kernel and a plain solve."""

import warnings

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

from nntk_dist import BlackBox, NNTKClassifier, NNTKError, NNTKRegressor, nonlocal_kernel
from nntk_dist.sampling.laws import Student

Array = np.ndarray


def build(num_features: int, num_outputs: int) -> nn.Module:
    """A small network for any data."""
    return nn.Sequential(nn.Linear(num_features, 8), nn.ReLU(), nn.Linear(8, num_outputs)).double()


def network(num_features: int = 3, num_outputs: int = 2) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return build(num_features, num_outputs)


def data(n: int = 20, seed: int = 0) -> tuple[Array, Array]:
    X = np.random.default_rng(seed).normal(size=(n, 3))
    return X, np.stack([np.sin(X[:, 0]), X[:, 1] * X[:, 2]], axis=1)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        pytest.param(NNTKClassifier, {"estimator": "weight", "draws": 32}, id="classifier by differences"),
        pytest.param(NNTKRegressor, {"estimator": "weight", "draws": 32}, marks=pytest.mark.statistical),
        pytest.param(NNTKRegressor, {}, marks=pytest.mark.statistical),
        pytest.param(NNTKClassifier, {}, marks=pytest.mark.statistical),
    ],
)
def test_scikit_learns_own_checks(kind, settings):
    """All that apply; scikit-learn checks inputs of other array libraries only if SCIPY_ARRAY_API is set."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the skip of that check, and warnings that the checks provoke
        results = check_estimator(kind(build, gamma=0.1, **settings), on_fail=None)
    assert len(results) > 45
    assert {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"} == {}
    assert {r["check_name"] for r in results if r["status"] != "passed"} <= {"check_array_api_input"}


def scores_by_definition(model, X, targets, new, ridge, outputs=None, new_outputs=None, **options):
    """Kernel ridge regression with the library's plugin kernel and one dense solve."""
    first, second = torch.from_numpy(X), torch.from_numpy(new)
    gram = nonlocal_kernel(model, first, **options).plugin.numpy()
    cross = nonlocal_kernel(model, first, second, **options).plugin.numpy().T
    offset, new_offset = (0.0, 0.0) if outputs is None else (outputs, new_outputs)
    penalty = ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
    return cross @ np.linalg.solve(gram + penalty, targets - offset) + new_offset


@pytest.mark.parametrize("estimator", ["weight", "autodiff"])
@pytest.mark.parametrize("center", [False, True])
def test_a_regressor_solves_with_the_kernel_of_the_same_draws(estimator, center):
    model, (X, Y), (new, _) = network(), data(), data(7, seed=1)
    options = {"gamma": 0.3, "estimator": estimator, "draws": 32, "seed": 4}
    fitted = NNTKRegressor(model, ridge=0.1, center_outputs=center, **options).fit(X, Y)
    with torch.no_grad():
        values = [model(torch.from_numpy(x)).numpy() for x in (X, new)] if center else []
    expected = scores_by_definition(model, X, Y, new, 0.1, *values, **options)
    np.testing.assert_allclose(fitted.predict(new), expected, rtol=0, atol=1e-9)
    assert fitted.ridge_ == 0.1
    assert fitted.kernel_.decision.estimator == estimator
    one = NNTKRegressor(model, ridge=0.1, **options).fit(X, Y[:, 0])
    assert one.predict(new).shape == (7,)


def test_predictions_do_not_depend_on_what_is_predicted_beside_them():
    (X, Y), (new, _) = data(), data(9, seed=1)
    fitted = NNTKRegressor(network(), gamma=0.3, batch=4).fit(X, Y)
    np.testing.assert_allclose(fitted.predict(new)[5:6], fitted.predict(new[5:6]), rtol=0, atol=1e-12)


def test_of_several_ridges_the_one_of_least_leave_one_out_error_is_taken():
    (X, Y), ridges = data(40), (1e-3, 1e-1, 10.0)
    fitted = NNTKRegressor(network(), gamma=0.3, ridge=ridges).fit(X, Y)
    errors = []
    for ridge in ridges:  # left out by hand, at the ridge of all examples
        gram = fitted.kernel_.gram()
        shifted = gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
        rest = [np.delete(np.arange(len(X)), i) for i in range(len(X))]
        left = [Y[i] - gram[i, r] @ np.linalg.solve(shifted[np.ix_(r, r)], Y[r]) for i, r in enumerate(rest)]
        errors.append(np.mean(np.square(left)))
    assert fitted.ridge_ == ridges[int(np.argmin(errors))]


def test_digits_with_labels_of_any_type():
    """The README's example; a random network's kernel easily exceeds 80 % on digits, guessing reaches 10 %."""
    digits = load_digits()
    X, names = digits.data / 16.0, np.array([f"digit {label}" for label in digits.target])
    model = network(64, 10).float()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    classifier = NNTKClassifier(model, gamma=0.05, ridge=1e-3).fit(X[:300], names[:300])
    assert classifier.predict(X[300:305]).dtype == names.dtype
    assert classifier.score(X[300:600], names[300:600]) > 0.8
    assert classifier.decision_function(X[:5]).shape == (5, 10)
    assert classifier.classes_.tolist() == sorted(set(names))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_two_classes_have_one_score():
    X, _ = data()
    y = np.where(X[:, 0] > 0, "yes", "no")
    fitted = NNTKClassifier(network(), gamma=0.3, ridge=1e-2).fit(X, y)
    assert fitted.decision_function(X).shape == (20,)
    assert np.array_equal(fitted.predict(X) == "yes", fitted.decision_function(X) > 0)


def test_searches_clones_and_pipelines():
    """A module is a parameter like any other: copied by `clone`, set by `set_params`, searched over."""
    (X, Y), model = data(30), network()
    search = GridSearchCV(
        NNTKRegressor(model, estimator="weight", draws=16), {"gamma": [0.1, 1.0], "model": [model, build]}, cv=2
    )
    search.fit(X, Y)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    copied = clone(NNTKRegressor(model, gamma=0.2))
    assert copied.model is not model
    assert copied.get_params()["gamma"] == 0.2
    assert copied.set_params(gamma=0.7).gamma == 0.7
    assert make_pipeline(StandardScaler(), NNTKRegressor(build)).fit(X, Y).predict(X).shape == Y.shape


def test_a_builders_network_is_a_function_of_the_seed():
    X, Y = data()
    first, again = (NNTKRegressor(build, gamma=0.3, seed=1).fit(X, Y).predict(X) for _ in range(2))
    other = NNTKRegressor(build, gamma=0.3, seed=2).fit(X, Y).predict(X)
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)


def test_images_keep_their_shape():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).double()
    X = np.random.default_rng(0).normal(size=(12, 1, 6, 6))
    classifier = NNTKClassifier(model, gamma=0.1).fit(X, np.arange(12) % 3)
    assert classifier.predict(X).shape == (12,)
    with pytest.raises(NNTKError, match=r"X has examples of shape \(1, 6, 5\); allowed: \(1, 6, 6\), as fitted"):
        classifier.predict(X[..., :5])


def test_full_kernels_regress_on_as_many_columns_as_outputs():
    (X, Y), (new, _) = data(), data(5, seed=1)
    fitted = NNTKRegressor(network(), gamma=0.3, outputs="full", ridge=0.1).fit(X, Y)
    assert fitted.predict(new).shape == (5, 2)
    with pytest.raises(NNTKError, match=r"the train kernel has 40 rows and the targets 20 examples of 1 column"):
        NNTKRegressor(network(), gamma=0.3, outputs="full").fit(X, Y[:, 0])


def test_a_black_box_learns():
    """A rule of thresholds, without any gradient: its kernel tells the two halves of the plane apart."""
    X, _ = data(80)
    y = X[:, 0] + 0.5 * X[:, 1] > 0
    rule = BlackBox(lambda params, x: np.sign(x @ params.reshape(3, 4)), np.linspace(-1.0, 1.0, 12))
    fitted = NNTKClassifier(rule, gamma=1.0, draws=512).fit(X[:60], y[:60])
    assert fitted.kernel_.decision.estimator == "weight"
    assert fitted.score(X[60:], y[60:]) > 0.8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": 3}, r"model is a int; allowed: a torch\.nn\.Module, or a function \(n_features, n_outputs\)"),
        ({"model": lambda a, b: "net"}, r"model returned a str; allowed: a torch\.nn\.Module"),
        ({"ridge": "loo"}, r"ridge is 'loo'; allowed: a positive number, or several"),
        ({"ridge": None}, r"ridge is None; allowed: a positive number, or several"),
        ({"ridge": -1.0}, r"ridges are \[-1\.0\]; allowed: one or more positive numbers"),
        ({"gamma": 0.0}, r"gamma is 0\.0; allowed: a number above 0"),
        ({"outputs": 5}, r"outputs is 5; allowed: 0 to 1"),
    ],
)  # fmt: skip
def test_wrong_settings_are_told_when_fitted(settings, message):
    X, Y = data()
    with pytest.raises(NNTKError, match=message):
        NNTKRegressor(**{"model": network(), "gamma": 0.3, **settings}).fit(X, Y)


def test_one_class_is_no_classification():
    X, _ = data()
    with pytest.raises(NNTKError, match=r"y holds one class, .*a.*; allowed: examples of two classes or more"):
        NNTKClassifier(network()).fit(X, ["a"] * len(X))


def test_laws_and_relative_ranges_are_passed_on():
    X, y = data()
    law = {"name": "student", "nu": 3.0}
    fitted = NNTKRegressor(network(), gamma=0.3, distribution=law, gamma_scale="relative", draws=16).fit(X, y)
    spec = fitted.kernel_.spec
    assert (spec.distribution, spec.gamma_scale) == (Student(gamma=0.3, nu=3.0), "relative")
    options = {"gamma": 0.3, "distribution": law, "gamma_scale": "relative", "draws": 16, "statistic": "plugin"}
    expected = nonlocal_kernel(network(), torch.from_numpy(X), **options).kernel
    np.testing.assert_allclose(fitted.kernel_.gram(), expected, rtol=0, atol=1e-10 * float(expected.max()))


@pytest.mark.parametrize(
    ("kind", "weighting"),
    [
        (NNTKRegressor, "parameter"),
        (NNTKRegressor, {"name": "output", "temperature": 0.2, "per_example": True}),
        (NNTKRegressor, {"name": "loss", "temperature": 0.2}),
        (NNTKRegressor, {"name": "loss", "temperature": 0.2, "reference": 7}),
        (NNTKClassifier, {"name": "loss", "temperature": 0.2}),
    ],
)
def test_weighted_kernels_are_fitted_with_the_targets_of_fit(kind, weighting):
    """The reference batch consists of train examples, also for the kernel of new ones."""
    model, (X, Y), (new, _) = network(), data(), data(7, seed=1)
    labels = np.where(Y[:, 0] > 0, "up", "down")
    codes, classifies = (labels == "up").astype(np.int64), kind is NNTKClassifier
    options = {"gamma": 0.3, "draws": 32, "seed": 4}
    fitted = kind(model, ridge=0.1, weighting=weighting, **options).fit(X, labels if classifies else Y)
    explicit = weighting
    if isinstance(weighting, dict):
        count = weighting.get("reference", len(X))
        explicit = weighting | {"reference": X[:count], "targets": (codes if classifies else Y)[:count]}

    def expected(**given):
        wanted = np.eye(2)[codes] if classifies else Y
        scores = scores_by_definition(model, X, wanted, new, 0.1, **given, **options)
        return scores[:, 1] - scores[:, 0] if classifies else scores

    scores = fitted.decision_function(new) if classifies else fitted.predict(new)
    np.testing.assert_allclose(scores, expected(weighting=explicit), rtol=0, atol=1e-9)
    assert np.abs(scores - expected(estimator="weight")).max() > 1e-4
    assert "consistent but not unbiased" in fitted.kernel_.decision.reason


def test_a_reference_batch_of_ones_own_needs_its_own_targets():
    (X, Y), (other, _) = data(), data(5, seed=2)
    with pytest.raises(NNTKError, match=r"weighting is 'loss', which needs targets of the reference batch"):
        NNTKRegressor(network(), gamma=0.3, weighting={"name": "loss", "reference": other}).fit(X, Y)


@pytest.mark.parametrize("outputs", ["trace", "full"])
def test_standard_deviations_are_a_gaussian_processs(outputs):
    """Against the formula with an explicit inverse of the library's own kernel."""
    (X, Y), (new, _) = data(), data(7, seed=1)
    options = {"gamma": 0.3, "estimator": "weight", "draws": 32, "seed": 4, "outputs": outputs}
    fitted = NNTKRegressor(network(), ridge=0.1, **options).fit(X, Y)
    predictions, deviations = fitted.predict(new, return_std=True)
    assert np.array_equal(predictions, fitted.predict(new))
    both = torch.from_numpy(np.concatenate([X, new]))
    whole = nonlocal_kernel(network(), both, **options).plugin.numpy()
    size = len(whole) // 27
    gram, cross, own = whole[: 20 * size, : 20 * size], whole[20 * size :, : 20 * size], whole[20 * size :, 20 * size :]
    inverse = np.linalg.inv(gram + 0.1 * np.trace(gram) / len(gram) * np.eye(len(gram)))
    posterior = np.diag(own - cross @ inverse @ cross.T).reshape(7, size)
    wanted = Y if size == 1 else Y.reshape(-1, 1)
    amplitude = np.diag(wanted.T @ inverse @ wanted) / len(wanted)
    np.testing.assert_allclose(deviations, np.sqrt(posterior * amplitude), rtol=1e-8)
    single = NNTKRegressor(network(), ridge=0.1, **(options | {"outputs": "trace"})).fit(X, Y[:, 0])
    assert single.predict(new, return_std=True)[1].shape == (7,)


def test_probabilities_are_as_sharp_as_left_out_examples_allow():
    """On the digits: a better log-loss on new examples than scores without a sharpness, and calibrated to 5 points."""
    X, y = load_digits(return_X_y=True)
    X = X / 16.0
    fitted = NNTKClassifier(build, gamma=0.1, estimator="weight", draws=64).fit(X[:400], y[:400])
    probabilities = fitted.predict_proba(X[400:900])
    np.testing.assert_allclose(probabilities.sum(1), 1.0)
    assert np.array_equal(fitted.classes_[probabilities.argmax(1)], fitted.predict(X[400:900]))
    plain = softmax(fitted.decision_function(X[400:900]), axis=1)
    assert log_loss(y[400:900], probabilities) < 0.7 * log_loss(y[400:900], plain)
    hits = fitted.predict(X[400:900]) == y[400:900]
    assert abs(probabilities.max(1).mean() - hits.mean()) < 0.05
    for factor in (0.9, 1.1):  # on the examples left out, no other sharpness has a larger likelihood
        scores = np.eye(10)[y[:400]] - fitted.path_.loo_residuals[fitted.path_.selected]
        losses = [
            log_loss(y[:400], softmax(a * scores, axis=1))
            for a in (1.0 * fitted.sharpness_, factor * fitted.sharpness_)
        ]
        assert losses[0] < losses[1]
