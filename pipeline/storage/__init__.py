"""Where a run lives: files, Zarr arrays, shards, tables, on disk or in an object store. No meanings."""
