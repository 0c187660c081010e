"""How torch is run: threads, precision, batches, memory that is reused or runs out, reading ahead.

Nothing here knows of models, kernels or stores.
"""
