"""The runnable system: configuration to plan to stages to report, serially or on Ray; and the command line."""
