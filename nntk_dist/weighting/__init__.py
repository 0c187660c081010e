"""Attention weights of draws: options, scores, softmax. No features."""
