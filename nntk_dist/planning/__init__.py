"""Decisions before a kernel is computed: probes of the model, the estimator and why, contraction, stacking, draws.

A decision is a frozen value that everything downstream is handed. No kernel is computed here.
"""
