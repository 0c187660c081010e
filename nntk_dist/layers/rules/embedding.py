"""Embedding tables.

Axes: n examples, c outputs of the model, t positions.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nntk_dist.layers.rules.rule import LayerRule


def embedding_gradients(
    module: nn.Module, parameters: Mapping[str, Tensor], h: Tensor, delta: Tensor
) -> dict[str, Tensor]:
    """Row v of the table: Σ δ_t over the positions t that hold token v; 0 for the padding token."""
    assert isinstance(module, nn.Embedding)
    tokens, delta = token_sides(module, h, delta)
    table = delta.new_zeros(*delta.shape[:2], module.num_embeddings, module.embedding_dim)
    if not delta.is_cuda:
        return {"weight": table.scatter_add_(2, tokens[:, None, :, None].expand(delta.shape), delta)}
    # On a GPU scatter_add_ adds in any order and index_put_ always in the same one; on a CPU it is the other way round.
    examples, outputs = (torch.arange(count, device=delta.device) for count in delta.shape[:2])
    index = (examples[:, None, None], outputs[:, None], tokens[:, None])
    return {"weight": table.index_put_(index, delta, accumulate=True)}


def token_sides(module: nn.Embedding, h: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (n, t), and δ (n, c, t, i), which is 0 at positions that hold the padding token."""
    tokens = h.reshape(len(h), -1)
    delta = delta.reshape(*delta.shape[:2], tokens.shape[1], -1)
    if module.padding_idx is not None:
        delta = delta * (tokens != module.padding_idx)[:, None, :, None]
    return tokens, delta


def _is_plain(module: nn.Module) -> bool:
    assert isinstance(module, nn.Embedding)
    return module.max_norm is None and not module.scale_grad_by_freq


EMBEDDING = LayerRule(nn.Embedding, embedding_gradients, covers=_is_plain)
