"""Random numbers and perturbations: the counter-based generator, the table of its streams, laws, designs, draws.

Every number is a pure function of (seed, stream, group, draw, index). No model is met here.
"""
