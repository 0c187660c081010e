"""The configuration: its schema, its overrides, and one clear message for each mistake. Builds nothing."""
