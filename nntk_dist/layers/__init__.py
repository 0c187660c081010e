"""Networks layer by layer: gradient rules, recorded passes, sketches, noise in pre-activations. No kernels."""
