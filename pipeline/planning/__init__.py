"""What a run will take: tasks, operations, seconds, bytes on disk and in memory; and the refusal of what cannot fit.

Nothing is started here, and no number of a kernel is computed.
"""
