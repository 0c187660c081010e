"""Helpers for the tests of the library and the studies in `scripts`; they assert nothing themselves.

    tools       the features and estimates of a kernel, made step by step, and its definition by brute force
    grids       parameters of tests combined in pairs
    many_seeds  the kernel of one unit under many seeds
    projecting  sketches computed from explicitly formed gradients

It imports the library and `tests.oracles`; tests, fixtures and anything about runs of the pipeline do not belong here.
"""
