"""The machine under a worker: CPUs, memory allocation, batches that fit. No tasks."""
