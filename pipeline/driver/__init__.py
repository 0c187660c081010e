"""The process that steers a run: it runs and resumes stages, searches for draws, verifies, and shows progress.

It hands tasks to an executor and keeps the records. It computes no tiles.
"""
