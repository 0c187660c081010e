"""Per-example gradient formulas, one file for each kind of layer. No draws, no kernels, no passes through a model."""

from nntk_dist.layers.rules.embedding import token_sides
from nntk_dist.layers.rules.linear import linear_sides, num_positions
from nntk_dist.layers.rules.rule import RULES, LayerRule, rule_for

__all__ = ["RULES", "LayerRule", "linear_sides", "num_positions", "rule_for", "token_sides"]
