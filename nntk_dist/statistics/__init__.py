"""From block products to kernels with error bars: plugin, unbiased, standard errors, bounds, tiles. No models."""
