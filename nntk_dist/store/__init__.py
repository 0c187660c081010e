"""Reading a stored kernel lazily. The only package of the library that opens a Zarr store.

Nothing is written here: `pipeline.storage` writes.
"""
