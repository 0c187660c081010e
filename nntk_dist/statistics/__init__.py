"""From block products to a kernel with error bars: `plugin`, `unbiased`, standard errors, bounds, required draws.

Standard errors are computed in `estimates`, the bound of the whole error in `error_bounds`, the statistics of a tile in
`tile_estimates`, which sets standard errors of unresolved entries to NaN. No models and no features.
"""
