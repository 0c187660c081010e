"""The driver process of a run: it runs and resumes stages, searches for draws, verifies, and shows progress.

It gives tasks to an executor and keeps the records. It computes no tiles.
"""
