"""How a model becomes features: one file for each estimator.

`weight` takes output differences, `autodiff` gradients at shrunken perturbations, `activation` noise in
pre-activations. Each makes a `FeatureMap` (`nntk_dist.products.features`) and says how its products are contracted.
Which estimator is used is decided in `nntk_dist.planning`; error bars are the business of `nntk_dist.statistics`.
"""
