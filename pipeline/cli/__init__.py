"""The command line `nntk`: one function for each verb, which parses arguments and prints.

What a verb does is in `pipeline.driver`.
"""
