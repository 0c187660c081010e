"""Attention weights of draws: options, scores, softmax.

Scores depend on parameters and outputs. Features and kernels do not belong here.
"""
