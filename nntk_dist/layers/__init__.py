"""Networks layer by layer: hooks, recorded inputs and gradients, rules for each layer type, sketches, noise.

What one layer contributes to the gradient of one example. Nothing here knows of draws, blocks or kernels.
"""
