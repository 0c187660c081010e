"""Examples that need more than a configuration: models and data that a script writes to a folder."""
