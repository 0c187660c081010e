"""How torch is run: threads, precision, batches, memory that runs out, reading ahead. No models and no kernels."""
