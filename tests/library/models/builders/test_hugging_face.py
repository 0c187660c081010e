"""`hf:FOLDER`: models of transformers from local folders are those that were saved; what is missing is named."""

import json
from pathlib import Path

import pytest
import torch

from nntk_dist.errors import ArgumentError, ModelError
from nntk_dist.models.builders import build_model


@pytest.fixture(scope="module")
def transformers():
    """The package, without its remarks about packages that are not installed."""
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


@pytest.fixture(scope="module")
def saved(transformers, tmp_path_factory):
    """A tiny GPT-2 with a tied head, and the folder that it was saved in."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_embd=8, n_head=2, vocab_size=17, n_positions=6, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    return model, folder


def build(folder, seed=0, **args):
    return build_model(f"hf:{folder}", args, input_shape=(5,), num_outputs=1, seed=seed)


def test_the_saved_model_comes_back(saved):
    model, folder = saved
    loaded = build(folder)
    ids = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_random_parameters_follow_from_the_seed(saved):
    _, folder = saved
    weights = [build(folder, seed, random=True).transformer.wte.weight for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_another_architecture_has_the_same_body(saved, transformers):
    model, folder = saved
    loaded = build(folder, architecture="GPT2Model")
    assert isinstance(loaded, transformers.GPT2Model)
    assert torch.equal(loaded.wte.weight, model.transformer.wte.weight)


def test_what_is_missing_is_named(saved, tmp_path):
    _, folder = saved
    with pytest.raises(ArgumentError, match=r"model hf:/nowhere: no such folder; give a folder that save_pretrained"):
        build(Path("/nowhere"))
    with pytest.raises(ArgumentError, match=r"the folder has no config\.json"):
        build(tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ArgumentError, match=r"the folder has no .safetensors file; save the weights there, or set ran"):
        build(tmp_path)
    assert build(tmp_path, random=True).config.n_embd == 8
    with pytest.raises(ArgumentError, match="no class 'GPT2LMHeedModel'; did you mean 'GPT2LMHeadModel'"):
        build(tmp_path, random=True, architecture="GPT2LMHeedModel")
    (tmp_path / "config.json").write_text(json.dumps({**settings, "architectures": None}))
    with pytest.raises(ArgumentError, match=r"config\.json names no architecture; give one as the argument arch"):
        build(tmp_path, random=True)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match=r"cannot be loaded: SafetensorError: "):
        build(tmp_path, architecture="GPT2LMHeadModel")
