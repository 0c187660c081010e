"""The runnable system: from a configuration to a plan, stages, a stored kernel and a report; and the command line.

Runs go serially or on Ray. The mathematics is in `nntk_dist`; this package says what is computed where, and keeps it.
"""
