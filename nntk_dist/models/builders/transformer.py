"""A small transformer for images (patches), sequences (tokens as given) and vectors (one scalar a token).

Pre-norm blocks, learned positions, optional dropout of what a block adds. Attention is written out with plain Linears
and a softmax: fused kernels would hide the Linears from layer-by-layer contraction and lack higher derivatives.

Axes: n examples, t tokens (the class token included), d model dimension, h heads, e = d / h.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nntk_dist.errors import ArgumentError, check_choice
from nntk_dist.models.builders.activations import make_activation
from nntk_dist.models.dropout import Dropout
from nntk_dist.registration.callables import check_integer


def transformer(
    *,
    input_shape: tuple[int, ...],
    num_outputs: int,
    dim: int = 64,
    depth: int = 2,
    heads: int = 4,
    hidden: int = 128,
    patch: int = 4,
    pool: str = "class",
    activation: str | Mapping[str, Any] = "gelu",
    dropout: float = 0.0,
) -> nn.Module:
    """A transformer encoder with a linear readout: (n, *input_shape) → (n, num_outputs).

    Args:
        input_shape: (channels, height, width) is cut into patches, (length, features) is a sequence of tokens,
            (features,) a sequence of scalar tokens.
        num_outputs: number of outputs.
        dim: width of a token, a multiple of `heads`.
        depth: number of blocks.
        heads: number of attention heads.
        hidden: width of the two-layer network in each block.
        patch: side of an image patch in pixels, a divisor of height and width.
        pool: input of the readout: `class` (a learned token) or `mean` (over tokens).
        activation: name, or `{name, …}`, of the activation (see `activations`).
        dropout: share of the numbers added to the tokens by each block that is zeroed at random, in eval mode too; at
            least 0, which adds no module, and below 1 (see `nntk_dist.models.dropout`).

    Raises:
        ArgumentError: an input shape of another form, or a bad value.
    """
    sizes = {"dim": dim, "depth": depth, "heads": heads, "hidden": hidden, "patch": patch}
    for name, value in sizes.items():
        check_integer(f"model transformer: {name}", value, minimum=1)
    check_choice("model transformer: pool", pool, ("class", "mean"))
    if dim % heads:
        raise ArgumentError(f"model transformer: dim is {dim} and heads {heads}; dim must be a multiple of heads")
    tokens = _Tokens(input_shape, patch)
    blocks = [_Block(dim, heads, hidden, activation, dropout) for _ in range(depth)]
    return _Transformer(tokens, blocks, dim, num_outputs, class_token=pool == "class")


class _Tokens(nn.Module):
    """(n, *input_shape) → (n, tokens, features): `num_tokens` and `num_features` say how many."""

    def __init__(self, input_shape: tuple[int, ...], patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.is_image = len(input_shape) == 3
        if self.is_image:
            channels, height, width = input_shape
            if height % patch or width % patch:
                raise ArgumentError(
                    f"model transformer: patch is {patch}, which does not divide images of {height} x {width} pixels; "
                    "give a common divisor of height and width"
                )
            self.num_tokens, self.num_features = (height // patch) * (width // patch), channels * patch**2
        elif len(input_shape) in (1, 2):
            self.num_tokens, self.num_features = (*input_shape, 1)[:2]
        else:
            raise ArgumentError(
                f"model transformer takes images (channels, height, width), sequences (length, features) and vectors "
                f"(features,), but an example has shape {input_shape}; use mlp for other shapes"
            )

    def forward(self, x: Float[Tensor, "n *input_shape"]) -> Float[Tensor, "n t features"]:
        """Cut each example into tokens; image patches row by row, channels first within each."""
        if self.is_image:
            # (n, c, rows, columns, patch, patch) → (n, rows, columns, c, patch, patch)
            patches = x.unfold(2, self.patch, self.patch).unfold(3, self.patch, self.patch)
            x = patches.permute(0, 2, 3, 1, 4, 5)
        return x.reshape(x.shape[0], self.num_tokens, self.num_features)


class _Attention(nn.Module):
    """Multi-head self-attention: softmax(q kᵀ / √e) v for each head, then one projection."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        """Mix the tokens of each example."""
        query, key, value = (self._split(linear(x)) for linear in (self.query, self.key, self.value))
        weights = torch.softmax(query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5, dim=-1)
        mixed: Tensor = self.output((weights @ value).transpose(1, 2).reshape(x.shape))
        return mixed

    def _split(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n h t e"]:
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)


class _Block(nn.Module):
    """x + attention(norm(x)), then x + two-layer network(norm(x))."""

    def __init__(self, dim: int, heads: int, hidden: int, activation: str | Mapping[str, Any], dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = _Attention(dim, heads)
        self.hidden_norm = nn.LayerNorm(dim)
        self.hidden = nn.Linear(dim, hidden)
        self.activation = make_activation(activation)
        self.output = nn.Linear(hidden, dim)
        self.dropout = Dropout(dropout) if dropout != 0 else None

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        """Apply the block."""
        x = x + self._thinned(self.attention(self.attention_norm(x)))
        return x + self._thinned(self.output(self.activation(self.hidden(self.hidden_norm(x)))))

    def _thinned(self, added: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        return added if self.dropout is None else self.dropout(added)


class _Transformer(nn.Module):
    def __init__(self, tokens: _Tokens, blocks: list[_Block], dim: int, num_outputs: int, *, class_token: bool) -> None:
        super().__init__()
        self.tokens = tokens
        self.embedding = nn.Linear(tokens.num_features, dim)
        self.class_token = nn.Parameter(0.02 * torch.randn(dim)) if class_token else None
        self.positions = nn.Parameter(0.02 * torch.randn(tokens.num_tokens + class_token, dim))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, num_outputs)

    def forward(self, x: Float[Tensor, "n *input_shape"]) -> Float[Tensor, "n outputs"]:
        """Outputs of a batch of examples."""
        hidden = self.embedding(self.tokens(x))
        if self.class_token is not None:
            hidden = torch.cat([self.class_token.expand(hidden.shape[0], 1, -1), hidden], dim=1)
        hidden = hidden + self.positions
        for block in self.blocks:
            hidden = block(hidden)
        pooled = hidden.mean(dim=1) if self.class_token is None else hidden[:, 0]
        output: Tensor = self.output(self.norm(pooled))
        return output
