"""Scores of draws, one per file: of parameters, of outputs, of the loss, and of a user's function.

To add one, write a class with the members of `ScoreRule` (`nntk_dist.weighting.scores.base`) and name it in the table
`SCORES` of `nntk_dist.weighting.options`, in the entry-point group `nntk_dist.scores` of your own package, or as
`python:module:Name`. A score does not draw perturbations or evaluate the model; it receives both.
"""
