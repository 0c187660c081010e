"""What a job fixes before it runs: data, model, layout, solvers, and what a stored run allows to change.

The only package that turns a configuration into objects. Nothing is computed here.
"""
