"""The values that describe a run and its tasks: frozen, picklable, kept in the manifest."""
