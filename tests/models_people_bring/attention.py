"""Attention, with PyTorch's fused kernels and its modules.

Axes: n examples, t positions.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tests.models_people_bring.case import Case, Computed, Given, numbers, of_module, of_tokens


class SelfAttention(nn.Module):
    """Fused attention written by hand, as in most language models."""

    def __init__(self, *, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.project, self.out, self.readout = nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.readout(torch.tanh(self.out(mixed.transpose(1, 2).flatten(2)))[:, -1])


class OfTorch(nn.Module):
    """`nn.MultiheadAttention` with a readout of the mean."""

    def __init__(self, *, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.readout, self.need_weights = nn.Linear(4, 2), need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.attention(x, x, x, need_weights=self.need_weights)[0].mean(1))


class Pooled(nn.Module):
    """A layer over positions, and a readout of the first one."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.readout = body, nn.Linear(4, 2)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        h = self.body(x) if padding is None else self.body(x, src_key_padding_mask=padding)
        return self.readout(h[:, 0])


class Decoder(nn.Module):
    """A decoder layer that attends to the input from a learnt query."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 2, 4))
        self.layer, self.readout = nn.TransformerDecoderLayer(4, 2, 6, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.layer(self.query.expand(len(x), -1, -1), x)[:, 0])


class LanguageModel(nn.Module):
    """A causal language model with a tied head; f is the logits of the last position."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(7, 4), nn.Embedding(5, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 6, activation="gelu", batch_first=True, norm_first=True)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=h.dtype)
        return self.head(self.block(h, src_mask=mask, is_causal=True)[:, -1])


class Vision(nn.Module):
    """Patches by a convolution, a class token, one block."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(1, 4, 2, stride=2), nn.Parameter(torch.randn(1, 1, 4))
        self.rest = Pooled(nn.TransformerEncoderLayer(4, 2, 6, activation="gelu", batch_first=True))

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).mT
        return self.rest(torch.cat((self.token.expand(len(x), -1, -1), h), 1))


def encoder_layer(**options: object) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, **{"activation": "gelu", **options})


PADDING = torch.arange(5) >= torch.tensor([5, 2, 4, 3])[:, None]


def padded() -> Given:
    encoder = nn.TransformerEncoder(encoder_layer(), 2)
    return Given(Pooled(encoder).double(), {"x": numbers(5, 4), "padding": PADDING})


CASES = (
    Case("fused attention", of_module(SelfAttention, 5, 4)),
    Case("causal fused attention", of_module(lambda: SelfAttention(causal=True), 5, 4)),
    Case("MultiheadAttention", of_module(lambda: OfTorch(need_weights=False), 5, 4)),
    Case("MultiheadAttention with weights", of_module(lambda: OfTorch(need_weights=True), 5, 4)),
    Case("TransformerEncoderLayer", of_module(lambda: Pooled(encoder_layer()), 5, 4)),
    Case("TransformerEncoderLayer with relu", of_module(lambda: Pooled(encoder_layer(activation="relu")), 5, 4)),
    Case("TransformerEncoderLayer, norm first", of_module(lambda: Pooled(encoder_layer(norm_first=True)), 5, 4)),
    Case(
        "TransformerEncoder with padding",
        padded,
        Computed(lambda m, i: m(numbers(5, 4)[i : i + 1], PADDING[i : i + 1])),
    ),
    Case("TransformerDecoderLayer", of_module(Decoder, 5, 4)),
    Case("language model with a tied head", of_tokens(LanguageModel, 5, 7)),
    Case("vision transformer", of_module(Vision, 1, 4, 4)),
)
