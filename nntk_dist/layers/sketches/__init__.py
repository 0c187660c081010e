"""Sketches of gradients: a few random numbers in place of all parameters, made layer by layer.

No draws and no kernels here: which layers are sketched is decided in `nntk_dist.estimators.contraction`.
"""
