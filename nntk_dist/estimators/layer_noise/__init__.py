"""Passes with noise in the pre-activations of layers, and the features that the estimator `activation` makes of them.

The estimator itself, which plans them, is `nntk_dist.estimators.activation`.
"""
