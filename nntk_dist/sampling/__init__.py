"""Random numbers and perturbations: the counter-based generator, its table of streams, laws, designs, draws.

Every number is a pure function of (seed, stream, group, draw, index). No model is evaluated here.
"""
