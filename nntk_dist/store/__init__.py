"""Reading stored kernels. This is the only package of the library that opens a Zarr store."""
