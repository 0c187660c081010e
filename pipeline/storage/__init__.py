"""Where a run lives: files, Zarr arrays, shards and tables, on disk or in an object store.

It writes and reads values whose meaning it does not know.
"""
