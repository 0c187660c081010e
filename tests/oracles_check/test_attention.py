"""The oracle of weights against numbers calculated by hand."""

import numpy as np

from tests.oracles import attention


def doubled(theta):
    """Two examples, two outputs, linear in two parameters."""
    return np.array([[theta[0], theta[1]], [2.0 * theta[0], 0.0]])


def test_weights_of_a_block_are_its_softmax():
    draws = np.ones((4, 2, 1, 1))
    shared = attention.weighted(draws, np.log([1.0, 3.0, 2.0, 2.0]), np.array([0, 0, 1, 1]), 1.0)[..., 0, 0]
    np.testing.assert_allclose(shared, [[0.5, 0.5], [1.5, 1.5], [1.0, 1.0], [1.0, 1.0]], rtol=1e-14)
    own = attention.weighted(draws[:2], np.log([[1.0, 1.0], [9.0, 1.0]]), np.array([0, 0]), 2.0)[..., 0, 0]
    np.testing.assert_allclose(own, [[0.5, 1.0], [1.5, 1.0]], rtol=1e-14)


def test_scores_of_a_linear_function():
    theta, z = np.array([1.0, 2.0]), np.array([[1.0, 0.0], [0.0, -1.0]])
    # |f|² of the examples: 5 and 4; the first draw moves them by 1 and 4, the second by 1 and 0.
    np.testing.assert_allclose(attention.output_scores(doubled, theta, z), [-5.0 / 9.0, -1.0 / 9.0], rtol=1e-14)
    own = attention.output_scores(doubled, theta, z, lambda theta: doubled(theta)[1:])
    np.testing.assert_allclose(own, [[-4.0 / 4.5], [0.0]], rtol=1e-14, atol=0)
    query, key = np.array([[1.0, 0.0]] * 4), np.array([[0.0, 1.0]] * 4)
    np.testing.assert_allclose(attention.parameter_scores(query, key, theta, z), [4.0, 2.0], rtol=1e-14)
    numbers = attention.loss_scores(doubled, theta, z, np.zeros((2, 2)))
    np.testing.assert_allclose(numbers, [-(4 + 4 + 16) / 4, -(1 + 1 + 4) / 4], rtol=1e-14)
    labels = attention.loss_scores(doubled, theta, z, np.array([0, 1]))
    np.testing.assert_allclose(labels, [(-np.log(2) - np.log1p(np.exp(4))) / 2, (-np.log(2) - np.log1p(np.exp(2))) / 2])
