"""What is written down about a run: manifest, ledger of finished tasks, lock.

No arrays: those are in `pipeline.storage`.
"""
