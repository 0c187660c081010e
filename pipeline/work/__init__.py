"""The work of a task: its context, tiles, workers; one file per stage in `stages`."""
