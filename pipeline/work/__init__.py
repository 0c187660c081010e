"""The work of one task: what it needs (context), tiles, workers; one file for each stage in `stages`.

A task is a pure, idempotent function of (fingerprint, job, tile). No task knows of others, of Ray or of progress.
"""
