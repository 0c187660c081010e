"""The example of a language model: its folder, its data, its adapters, and the configurations that use them.

Axes: n sequences, t positions.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from nntk_dist import local_kernel
from nntk_dist.models.builders import build_model
from pipeline.config.schema import load_config
from scripts.examples.language_model import MODEL, SMALL, tokens, with_adapters, write_example
from tests.oracles.autograd_loop import kernel_by_loop

TINY = {"n_layer": 1, "n_embd": 4, "n_head": 2, "vocab_size": 11, "n_positions": 8}
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("language_model")
    write_example(place, sequences=6, length=5, sizes=TINY)
    return place


def test_model_and_tokens_are_functions_of_the_seed(folder, tmp_path):
    write_example(tmp_path, sequences=6, length=5, sizes=TINY)
    states = [build(place).state_dict() for place in (folder, tmp_path)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    (inputs, targets), (again, _) = tokens(str(folder)), tokens(str(tmp_path))
    assert np.array_equal(inputs["input_ids"], again["input_ids"])
    assert inputs["input_ids"].shape == (6, 5)
    assert set(targets) <= {0, 1}


def build(folder: Path) -> torch.nn.Module:
    return build_model("hf", {"location": str(folder / MODEL)}, input_shape=(5,), num_outputs=1, seed=0)


def test_the_kernel_of_the_adapters_alone(folder):
    torch.manual_seed(0)
    model = with_adapters(str(folder), rank=2).double()
    with torch.no_grad():
        model.get_parameter("transformer.h.0.attn.c_attn.lora_b.weight").normal_()
    ids = torch.from_numpy(tokens(str(folder))[0]["input_ids"])[:3]
    chosen = [name for name, _ in model.named_parameters() if "lora_" in name]
    kernel = local_kernel(
        model, {"input_ids": ids}, parameters=["*lora_*"], output={"part": "logits", "measure": "next_token_loss"}
    )

    def loss(model: torch.nn.Module, i: int) -> torch.Tensor:
        return cross_entropy(model(input_ids=ids[i : i + 1]).logits[0, :-1], ids[i, 1:])

    assert len(chosen) == 2
    torch.testing.assert_close(kernel, kernel_by_loop(model, loss, 3, chosen), rtol=1e-10, atol=1e-14)


def test_adapters_follow_the_seed_of_the_configuration_and_begin_without_effect(folder):
    args, ids = {"folder": str(folder), "rank": 2}, torch.zeros(1, 5, dtype=torch.int64)
    builder = "python:scripts.examples.language_model:with_adapters"
    first, same, other = (build_model(builder, args, input_shape=(5,), num_outputs=1, seed=seed) for seed in (0, 0, 1))
    name = "transformer.h.0.attn.c_attn.lora_a.weight"
    assert torch.equal(first.get_parameter(name), same.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))
    assert torch.equal(first(ids).logits, build(folder)(ids).logits)


def test_the_configurations_name_what_the_script_writes():
    for name in ("loss", "logits", "lora"):
        config = load_config(CONFIGS / f"gpt2-{name}.yaml")
        assert config.data.source == "python:scripts.examples.language_model:tokens"
        place = config.data.args["folder"]
        assert config.model.builder == f"hf:{place}/{MODEL}" or config.model.args["folder"] == place
    with torch.device("meta"):
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config(**SMALL))
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808
