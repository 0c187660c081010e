"""The command line `nntk`."""
