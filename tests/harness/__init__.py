"""What the tests of the library and the studies in `scripts` build on, and what asserts nothing by itself.

    tools       the features and estimates of a kernel, made step by step, and its definition by brute force
    grids       parameters of tests combined in pairs
    many_seeds  the kernel of one unit under many seeds
    projecting  sketches made of gradients that were formed

It imports the library and `tests.oracles`; tests, fixtures and anything about runs of the pipeline do not belong here.
"""
