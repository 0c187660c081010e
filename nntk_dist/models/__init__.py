"""A model as a function of its parameters: selecting them, evaluating it, its own noise, black boxes, checkpoints.

No gradients and no perturbations are made here. Networks by name are in `builders`.
"""
