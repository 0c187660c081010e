"""The estimator `weight` with reduced variance: control variates from quantised weights, or from a regression.

The estimator itself, which plans them, is `nntk_dist.estimators.weight`.
"""
