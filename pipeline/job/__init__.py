"""The values that describe a run and its tasks: frozen, picklable, kept in the manifest.

No behaviour beyond what follows from the values themselves.
"""
