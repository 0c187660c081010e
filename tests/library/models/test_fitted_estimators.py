"""Fitted scikit-learn estimators as black boxes: the kernel is that of their decision as a plain function."""

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neural_network import MLPRegressor
from sklearn.tree import DecisionTreeRegressor

from nntk_dist import BlackBox, covariance_kernel, nonlocal_kernel
from nntk_dist.errors import ArgumentError

X = np.random.default_rng(0).normal(size=(40, 3))
Y = np.sin(X[:, 0]) + X[:, 1]
NEW = np.random.default_rng(1).normal(size=(6, 3))
OPTIONS = {"gamma": 0.5, "draws": 64, "seed": 3}


def test_a_linear_models_kernel_is_its_functions():
    fitted = Ridge().fit(X, Y)
    box = BlackBox.of_estimator(fitted, ["coef_", "intercept_"])
    np.testing.assert_allclose(box.params.detach(), [*fitted.coef_, fitted.intercept_])
    by_hand = BlackBox(lambda params, x: x @ params[:3] + params[3], [*fitted.coef_, fitted.intercept_])
    before = fitted.coef_.copy()
    kernels = [nonlocal_kernel(each, NEW, **OPTIONS).kernel for each in (box, by_hand)]
    torch.testing.assert_close(*kernels, rtol=1e-9, atol=1e-12)
    assert np.array_equal(before, fitted.coef_)


def test_a_trees_thresholds_and_values():
    """Against a function that walks the tree by itself."""
    fitted = DecisionTreeRegressor(max_depth=3, random_state=0).fit(X, Y)
    tree = fitted.tree_
    count = tree.node_count

    def walk(params, x):
        thresholds, values = params[:count], params[count:]
        result = []
        for row in x:
            node = 0
            while tree.children_left[node] >= 0:
                left = np.float32(row[tree.feature[node]]) <= thresholds[node]
                node = tree.children_left[node] if left else tree.children_right[node]
            result.append(values[node])
        return np.array(result)

    before = tree.threshold.copy()
    box = BlackBox.of_estimator(fitted, ["tree_.threshold", "tree_.value"])
    by_hand = BlackBox(walk, np.concatenate([tree.threshold, tree.value.ravel()]))
    kernels = [covariance_kernel(each, NEW, **OPTIONS).kernel for each in (box, by_hand)]
    torch.testing.assert_close(*kernels, rtol=1e-9, atol=1e-12)
    assert float(kernels[0].diagonal().min()) > 0
    assert np.array_equal(before, tree.threshold)


@pytest.mark.parametrize(
    ("fitted", "names", "num_outputs"),
    [
        (LogisticRegression().fit(X, (Y > 0).astype(int) + (Y > 1)), ["coef_", "intercept_"], 3),
        (MLPRegressor(hidden_layer_sizes=(4,), max_iter=20, random_state=0).fit(X, Y), ["coefs_.0", "coefs_.1"], 1),
        (
            RandomForestRegressor(3, max_depth=2, random_state=0).fit(X, Y),
            [f"estimators_.{i}.tree_.value" for i in range(3)],
            1,
        ),
    ],
    ids=["classifier", "network", "forest"],
)
@pytest.mark.filterwarnings("ignore::nntk_dist.errors.NNTKWarning")
def test_other_estimators(fitted, names, num_outputs):
    box = BlackBox.of_estimator(fitted, names)
    method = "decision_function" if num_outputs == 3 else "predict"
    expected = np.asarray(getattr(fitted, method)(NEW)).reshape(6, -1)
    np.testing.assert_allclose(box(torch.from_numpy(NEW)).reshape(6, -1), expected)
    assert nonlocal_kernel(box, NEW, outputs="full", **OPTIONS).kernel.shape == (6 * num_outputs, 6 * num_outputs)


def test_what_is_wrong_is_named():
    fitted = DecisionTreeRegressor(max_depth=2).fit(X, Y)
    with pytest.raises(ArgumentError, match=r"fn is a DecisionTreeRegressor; .*; use BlackBox.of_est"):
        BlackBox(fitted, [1.0])
    with pytest.raises(
        ArgumentError, match=r"a Tree has no attribute 'treshold' \(of 'tree_.treshold'\); did you mean"
    ):
        BlackBox.of_estimator(fitted, ["tree_.treshold"])
    with pytest.raises(ArgumentError, match=r"a Ridge has no attribute 'coef_' \(of 'coef_'\).*; is it fitted\?"):
        BlackBox.of_estimator(Ridge(), ["coef_"])
    with pytest.raises(ArgumentError, match=r"the attribute 'tree_.feature' has dtype int64; allowed: floating-point"):
        BlackBox.of_estimator(fitted, ["tree_.feature"])
    with pytest.raises(ArgumentError, match=r"has no method decision_function; name one with method"):
        BlackBox.of_estimator(fitted, ["tree_.value"], method="decision_function")
    with pytest.raises(ArgumentError, match="names is empty"):
        BlackBox.of_estimator(fitted, [])
