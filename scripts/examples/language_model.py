"""A language model of the shape of GPT-2 small with random weights, token data, and LoRA adapters: for the
configurations `configs/gpt2-*.yaml`.

    python -m scripts.examples.language_model runs/gpt2-small

writes the model's folder (`config.json` and safetensors, 500 MB) and the tokens, both functions of a seed. Nothing is
downloaded. With weights of your own in such a folder, the same configurations give their kernels.

Axes: n sequences, t positions, i/o units in/out, r rank of an adapter.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from nntk_dist.models.builders import build_model

MODEL, TOKENS = "model", "tokens.npz"  # inside the folder
# Of GPT-2 small, 124,439,808 parameters with a tied head.
SMALL = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}


def write_example(
    folder: Path, *, sequences: int = 512, length: int = 64, seed: int = 0, sizes: dict[str, int] | None = None
) -> None:
    """Write a model with random weights and sequences of random tokens.

    Args:
        folder: where to; made if it does not exist.
        sequences: n.
        length: t, tokens of a sequence.
        seed: of weights and tokens.
        sizes: of the model, as `GPT2Config` names them; GPT-2 small by default.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = SMALL if sizes is None else sizes
    last = sizes["vocab_size"] - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=last, eos_token_id=last))
    model.save_pretrained(folder / MODEL)
    ids = np.random.default_rng(seed).integers(0, sizes["vocab_size"], (sequences, length))
    np.savez(folder / TOKENS, ids=ids)


def tokens(folder: str) -> tuple[dict[str, Int64[np.ndarray, "n t"]], Int64[np.ndarray, " n"]]:
    """Return the sequences as the part `input_ids`; targets are classes, the parity of the first token.

    Random tokens have no better target. A source for real text returns its own.
    """
    ids = np.load(Path(folder) / TOKENS)["ids"]
    return {"input_ids": ids}, ids[:, 0] % 2


class Adapted(nn.Module):
    """A linear layer plus a low-rank one: h ↦ layer(h) + scale · B A h."""

    def __init__(self, layer: nn.Module, inputs: int, outputs: int, *, rank: int, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale
        self.lora_a = nn.Linear(inputs, rank, bias=False)
        self.lora_b = nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, h: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        """Apply the layer and its adapter."""
        adapted: Tensor = self.layer(h) + self.scale * self.lora_b(self.lora_a(h))
        return adapted


def with_adapters(folder: str, *, rank: int = 8, alpha: float = 16.0, layers: Sequence[str] = ("c_attn",)) -> nn.Module:
    """Load the model and add an adapter to every layer of these names.

    As LoRA begins, B is 0 and A is random, from the seed of the configuration. `parameters: ["*lora_*"]` selects the
    adapters alone.

    Args:
        folder: as `write_example` writes it.
        rank: r.
        alpha: an adapter is multiplied by alpha/r.
        layers: last parts of the names of layers of the class `Conv1D`, whose weight is (i, o).
    """
    # build_model has forked the generator, so that A follows the seed
    model = build_model("hf", {"location": str(Path(folder) / MODEL)}, input_shape=(1,), num_outputs=1, seed=0)
    for path, layer in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if name in layers:
            inputs, outputs = layer.get_parameter("weight").shape
            adapted = Adapted(layer, inputs, outputs, rank=rank, scale=alpha / rank)
            setattr(model.get_submodule(parent), name, adapted)
    return model


def main() -> None:
    """Write the example to a folder."""
    parser = argparse.ArgumentParser(description="Write a random language model and token data.")
    parser.add_argument("folder", type=Path, help="where to write, such as runs/gpt2-small")
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write_example(given.folder, sequences=given.sequences, length=given.length, seed=given.seed)


if __name__ == "__main__":
    main()
