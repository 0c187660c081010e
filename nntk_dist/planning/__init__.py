"""Probes of a model and the decision that follows: estimator, contraction, stacking. No kernel is computed here."""
