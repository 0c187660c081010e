"""Attention weights of draws: options, scores, softmax.

Scores see parameters and outputs, never features or kernels.
"""
