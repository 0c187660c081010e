"""The configuration of a run: its schema, overrides, and one clear message for each mistake.

It describes and checks; objects are built from it in `pipeline.decisions`.
"""
