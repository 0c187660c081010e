"""Reading a stored kernel. The only package of the library that opens a Zarr store."""
