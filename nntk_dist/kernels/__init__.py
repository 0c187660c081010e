"""Kernels of a model on tensors in memory: the functions that users call, and their result."""
