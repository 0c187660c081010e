"""What a worker knows of its machine: CPUs, memory allocation, batches that fit.

Nothing here knows of tasks or kernels.
"""
