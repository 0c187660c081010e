"""Checkpoints: both formats, nested and tied ones, what training leaves behind, and every kind of mismatch."""

import copy
import logging
import re

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from nntk_dist.errors import ModelError, NNTKError
from nntk_dist.models.builders import build_model, load_checkpoint


def build(seed, widths=(4,)):
    return build_model("mlp", {"widths": list(widths)}, input_shape=(3,), num_outputs=2, seed=seed)


def assert_same(model, other):
    assert model.state_dict().keys() == other.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("nested", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth", "pth.tar"])
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
    with pytest.raises(NNTKError, match=r"has the suffix '.h5'; allowed: .safetensors, .pt, .pth, .ckpt, .bin, .tar"):
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
    refused = r"cannot be read by torch.load\(weights_only=True\) \(it holds a torch.nn.modules.container.Sequential"
    with pytest.raises(NNTKError, match=refused):
        load_checkpoint(build(0), tmp_path / "model.pt")


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {}])
def test_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(
        NNTKError, match=r"holds no state dict of tensors, neither bare nor under state_dict, model_state_dict, model"
    ):
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


def layers():
    """Linear layers and one with running statistics, which are not those of a new model."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model.train()(torch.randn(20, 4))
    return model.eval()


class Wrapped(nn.Module):
    """As a Lightning module or a trainer holds a model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


class Scaled(nn.Linear):
    """A module with a value beside its tensors."""

    factor = 1.0

    def get_extra_state(self):
        return {"factor": self.factor}

    def set_extra_state(self, state):
        self.factor = state["factor"]

    def forward(self, x):
        return self.factor * super().forward(x)


def with_factor(factor):
    model = nn.Sequential(Scaled(4, 2))
    model[0].factor = factor
    return model


def with_compiled_part():
    model = layers()
    model[0] = torch.compile(model[0], backend="eager")
    return model


def old_weight_norm():
    return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 2)))


def new_weight_norm():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)))


def old_spectral_norm():
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 2))).eval()


def without_counters(state):
    return {name: value for name, value in state.items() if "num_batches" not in name}


def without_counters_but_with_versions(state):
    del state["1.num_batches_tracked"]
    return state


CONVERTED = "weight normalisation was converted to weight_g and weight_v"
# What was trained, what it is loaded into, how its state dict is saved, and what is said.
TRAINED = {
    "DataParallel": (lambda: nn.DataParallel(layers()), layers, None, "the prefix 'module.' was removed from all keys"),
    "compiled": (
        lambda: torch.compile(layers(), backend="eager"),
        layers,
        None,
        "the prefix '_orig_mod.' was removed from all keys",
    ),
    "compiled part": (with_compiled_part, layers, None, "'_orig_mod.' was removed inside keys: parts .* compiled"),
    "Lightning": (
        lambda: Wrapped(layers()),
        layers,
        lambda state: {"state_dict": state, "epoch": 3, "pytorch-lightning_version": "2.5.0", "loops": {}},
        "the prefix 'model.' was removed from all keys",
    ),
    "all of them": (
        lambda: Wrapped(nn.DataParallel(torch.compile(layers(), backend="eager"))),
        layers,
        None,
        "the prefix 'model.module._orig_mod.' was removed from all keys",
    ),
    "a model with an attribute of that name": (lambda: Wrapped(layers()), lambda: Wrapped(layers()), None, None),
    "the same, wrapped": (
        lambda: Wrapped(Wrapped(layers())),
        lambda: Wrapped(layers()),
        None,
        "the prefix 'model.' was removed from all keys",
    ),
    "no counters": (layers, layers, without_counters, None),
    "no counters, new": (layers, layers, without_counters_but_with_versions, "1 missing num_batches_tracked kept"),
    "old weight norm": (old_weight_norm, old_weight_norm, None, None),
    "new weight norm": (new_weight_norm, new_weight_norm, None, None),
    "old into new weight norm": (old_weight_norm, new_weight_norm, None, None),
    "new into old weight norm": (new_weight_norm, old_weight_norm, None, CONVERTED),
    "spectral norm": (lambda: nn.DataParallel(old_spectral_norm()), old_spectral_norm, None, "'module.' was removed"),
    "extra state": (lambda: with_factor(3.0), lambda: with_factor(1.0), None, None),
    "lazy": (lambda: nn.Sequential(nn.Linear(4, 2)), lambda: nn.Sequential(nn.LazyLinear(2)), None, None),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", TRAINED)
def test_what_training_leaves_behind_is_loaded_and_named(kind, tmp_path, caplog):
    train, new, save, said = TRAINED[kind]
    torch.manual_seed(0)
    trained, x, path = train(), torch.randn(5, 4), tmp_path / "trained.pt"
    state = trained.state_dict()
    torch.save(state if save is None else save(state), path)
    expected = trained.eval()(x).detach()
    torch.manual_seed(1)
    model = new()
    with caplog.at_level(logging.INFO, logger="nntk_dist"):
        notes = load_checkpoint(model, path)
    assert torch.allclose(model.eval()(x), expected, rtol=1e-6, atol=1e-6)
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("nntk_dist")]
    assert logged == [f"checkpoint '{path}': {note}" for note in notes]
    assert len(notes) == (said is not None)
    assert said is None or re.search(said, notes[0])


def test_a_file_that_does_not_fit_leaves_the_model_alone(tmp_path):
    """Also if torch notices it only after it has copied some tensors, here for want of extra state."""
    torch.save(nn.Sequential(nn.Linear(4, 2)).state_dict(), tmp_path / "trained.pt")
    model = with_factor(3.0)
    before = copy.deepcopy(model)
    with pytest.raises(ModelError, match=r"does not fit the model: 1 missing \('0._extra_state'\) key"):
        load_checkpoint(model, tmp_path / "trained.pt")
    assert torch.equal(model[0].weight, before[0].weight)
    assert model[0].factor == 3.0


def test_a_module_that_refuses_its_extra_state(tmp_path):
    torch.save({**with_factor(1.0).state_dict(), "0._extra_state": {"other": 1.0}}, tmp_path / "trained.pt")
    with pytest.raises(ModelError, match=r"does not fit the model: 'factor'; use the builder"):
        load_checkpoint(with_factor(1.0), tmp_path / "trained.pt")


def test_complex_numbers_are_not_cut_to_their_real_parts(tmp_path):
    torch.save({"weight": torch.ones(2, 4, dtype=torch.complex64), "bias": torch.ones(2)}, tmp_path / "trained.pt")
    with pytest.raises(ModelError, match=r"'weight' is complex, the model's is torch.float32"):
        load_checkpoint(nn.Linear(4, 2), tmp_path / "trained.pt")


def test_a_wrapper_with_other_parts_names_the_nearest_key(tmp_path):
    trained = nn.ModuleDict({"model": nn.Linear(4, 2), "loss": nn.Linear(2, 2)})
    torch.save(trained.state_dict(), tmp_path / "trained.pt")
    with pytest.raises(ModelError, match=r"2 missing \('weight', 'bias'\) and 4 unknown \('model.weight'.*'weight'\?"):
        load_checkpoint(nn.Linear(4, 2), tmp_path / "trained.pt")
