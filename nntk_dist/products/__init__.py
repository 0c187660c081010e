"""Products of features: what every kind of feature offers, and how tiles are summed from block products.

Tensors in, sums out. No model is evaluated here, and no standard error is computed: see `nntk_dist.statistics`.
"""
