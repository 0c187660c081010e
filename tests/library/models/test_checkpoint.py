"""Checkpoints: both formats, nested and tied ones, and every kind of mismatch."""

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from nntk_dist.errors import NNTKError
from nntk_dist.models.builders import build_model, load_checkpoint


def build(seed, widths=(4,)):
    return build_model("mlp", {"widths": list(widths)}, input_shape=(3,), num_outputs=2, seed=seed)


def assert_same(model, other):
    assert model.state_dict().keys() == other.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("nested", [None, "state_dict", "model"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth"])
def test_round_trip(tmp_path, suffix, nested):
    trained, model, path = build(1), build(2), tmp_path / f"model.{suffix}"
    if suffix == "safetensors":
        save_file(trained.state_dict(), path)
    else:
        state = trained.state_dict()
        torch.save({nested: state, "epoch": 3} if nested else state, path)
    load_checkpoint(model, path)
    assert_same(model, trained)


def test_values_take_the_types_of_the_model_and_buffers_come_along(tmp_path):
    def resnet(seed):
        args = {"depth": 8, "width": 2}
        return build_model("resnet", args, input_shape=(1, 8, 8), num_outputs=2, seed=seed)

    trained = resnet(1).train()
    trained(torch.randn(4, 1, 8, 8))
    save_file(trained.double().state_dict(), tmp_path / "model.safetensors")
    model = resnet(2)
    load_checkpoint(model, tmp_path / "model.safetensors")
    assert next(model.parameters()).dtype == torch.float32
    assert not model.training
    assert_same(model, trained.float())


def test_tied_parameters_may_be_stored_once(tmp_path):
    def tied(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    trained, model = tied(1), tied(2)
    save_model(trained, str(tmp_path / "model.safetensors"))
    load_checkpoint(model, tmp_path / "model.safetensors")
    assert_same(model, trained)


def test_missing_file(tmp_path):
    with pytest.raises(NNTKError, match=r"checkpoint '.*none.pt' does not exist"):
        load_checkpoint(build(0), tmp_path / "none.pt")


def test_unknown_suffix(tmp_path):
    with pytest.raises(NNTKError, match=r"has the suffix '.h5'; allowed: .safetensors, .pt, .pth, .ckpt, .bin"):
        load_checkpoint(build(0), tmp_path / "model.h5")


@pytest.mark.parametrize(
    ("suffix", "message"), [("safetensors", "is no readable safetensors file"), ("pt", "cannot be read by torch.load")]
)
def test_damaged_file(tmp_path, suffix, message):
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(NNTKError, match=message):
        load_checkpoint(build(0), path)


def test_whole_models_are_refused(tmp_path):
    torch.save(build(0), tmp_path / "model.pt")
    with pytest.raises(NNTKError, match=r"cannot be read by torch.load\(weights_only=True\)"):
        load_checkpoint(build(0), tmp_path / "model.pt")


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {}])
def test_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(NNTKError, match=r"holds no state dict of tensors, neither bare nor under state_dict or model"):
        load_checkpoint(build(0), tmp_path / "model.pt")


def test_missing_key(tmp_path):
    state = build(1).state_dict()
    del state["hidden0.bias"]
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(NNTKError, match=r"does not fit the model: 1 missing \('hidden0.bias'\) key"):
        load_checkpoint(build(0), tmp_path / "model.pt")


def test_unknown_key_names_the_nearest_missing_one(tmp_path):
    state = build(1).state_dict()
    state["hidden_0.bias"] = state.pop("hidden0.bias")
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(NNTKError, match=r"1 unknown \('hidden_0.bias'\) key.*did you mean 'hidden0.bias'\?"):
        load_checkpoint(build(0), tmp_path / "model.pt")


def test_wrong_shape_leaves_the_model_alone(tmp_path):
    torch.save(build(1, widths=(5,)).state_dict(), tmp_path / "model.pt")
    model = build(0)
    with pytest.raises(NNTKError, match=r"'hidden0.weight' has shape \(5, 3\), the model needs \(4, 3\) \(3 shape"):
        load_checkpoint(model, tmp_path / "model.pt")
    assert_same(model, build(0))
