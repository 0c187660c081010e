"""Kernels of a model in memory, in one process and without a store.

`functions` has the public functions, `prepared` the kernel of a model whose decision is kept, `estimate` its result and
`tiles` the whole kernel from features. What does not fit into memory belongs to the pipeline.
"""
