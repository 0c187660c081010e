"""Reading trained parameters into a model, from safetensors files and from `torch.save` files.

What `load_state_dict(strict=True)` of torch takes is taken here too, with the differences that training leaves behind:
a container around the state dict, prefixes of wrappers, tied parameters stored once, missing counters of batches. No
code of a file is run (`weights_only=True`), and no part is loaded: every other key and shape must match.

Axes: none.
"""

import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nntk_dist.errors import ArgumentError, ModelError, nearest_name, one_line

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar")
NESTED_KEYS = ("state_dict", "model_state_dict", "model")
# DataParallel and DistributedDataParallel, torch.compile, and Lightning modules or trainers with an attribute `model`.
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.")
_COMPILED = "_orig_mod."
_EXTRA_STATE = "_extra_state"
_COUNTER = "num_batches_tracked"  # in eval mode nothing reads it
_WEIGHT_NORM = (("parametrizations.weight.original0", "weight_g"), ("parametrizations.weight.original1", "weight_v"))

_LOG = logging.getLogger(__name__)


def load_checkpoint(model: nn.Module, path: str | Path) -> tuple[str, ...]:
    """Replace the parameters and buffers of a model, in place, by those stored in a file.

    The file contains a state dict, bare or under the key `state_dict`, `model_state_dict` or `model`. The prefixes
    `module.`, `_orig_mod.` and `model.` are removed if the model's own names lack them. Values are converted to the
    model's types. A tied parameter may be stored under only one of its names, weight normalisation in its old or its
    new form, and `num_batches_tracked` not at all. What was done is logged at level INFO.

    Args:
        model: changed in place.
        path: `.safetensors`, or `.pt`, `.pth`, `.ckpt`, `.bin`, `.tar` for files of `torch.save`.

    Returns:
        What was done to make the file fit, in sentences; nothing if it fits as it is.

    Raises:
        ArgumentError: the file is missing, unreadable or of another format.
        ModelError: a key or a shape differs from the model's, or a module refuses its extra state.

    Example:
        >>> import tempfile
        >>> model, file = nn.Linear(2, 1), Path(tempfile.mkdtemp()) / "trained.pt"
        >>> torch.save({"state_dict": nn.DataParallel(nn.Linear(2, 1)).state_dict()}, file)
        >>> load_checkpoint(model, file)
        ("the prefix 'module.' was removed from all keys",)
    """
    path = Path(path)
    state, notes = _fitting_names(_state_dict(_read(path), path), set(model.state_dict()))
    _check_shapes(model.state_dict(), state, path)
    before = {name: _copy(value) for name, value in model.state_dict().items()}
    try:
        notes += _load(model, state, path)
    except ModelError:
        model.load_state_dict(before, strict=False)  # no part stays loaded
        raise
    for note in notes:
        _LOG.info("checkpoint '%s': %s", path, note)
    return tuple(notes)


def _read(path: Path) -> Any:
    if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
        allowed = ", ".join((".safetensors", *TORCH_SUFFIXES))
        raise ArgumentError(f"checkpoint '{path}' has the suffix '{path.suffix}'; allowed: {allowed}")
    if not path.is_file():
        raise ArgumentError(f"checkpoint '{path}' does not exist or is not a file; give the path of a saved state dict")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ArgumentError(f"checkpoint '{path}' is no readable safetensors file: {error}") from error
    except Exception as error:  # torch.load raises half a dozen types for damaged files and refused classes
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds a {refused[1]}" if refused else type(error).__name__
        raise ArgumentError(
            f"checkpoint '{path}' cannot be read by torch.load(weights_only=True) ({reason}); "
            "save it again with torch.save(model.state_dict(), path)"
        ) from error


def _state_dict(content: Any, path: Path) -> "OrderedDict[str, Any]":
    """The state dict that a file contains, with the versions of modules that torch keeps beside it."""
    if isinstance(content, Mapping):
        nested = next((content[key] for key in NESTED_KEYS if isinstance(content.get(key), Mapping)), content)
        if nested and all(isinstance(value, Tensor) or _is_extra(key) for key, value in nested.items()):
            return _renamed(nested, lambda name: name)
    raise ArgumentError(
        f"checkpoint '{path}' holds no state dict of tensors, neither bare nor under {', '.join(NESTED_KEYS)}; "
        "save it with torch.save(model.state_dict(), path)"
    )


def _is_extra(name: object) -> bool:
    """Whether a key holds what a module returns from `get_extra_state`, a value of any type."""
    return str(name).rpartition(".")[2] == _EXTRA_STATE


def _renamed(state: Mapping[str, Any], rename: Callable[[str], str]) -> "OrderedDict[str, Any]":
    """The state dict under other names; modules' versions, by which torch reads older forms, move along."""
    result = OrderedDict((rename(name), value) for name, value in state.items())
    versions = getattr(state, "_metadata", {})
    # a module's name is the prefix of its keys, without the dot
    moved = {rename(f"{name}.").removesuffix("."): each for name, each in versions.items()}
    result._metadata = moved  # type: ignore[attr-defined]
    return result


def _fitting_names(state: "OrderedDict[str, Any]", expected: set[str]) -> tuple["OrderedDict[str, Any]", list[str]]:
    """The state dict under the names of the model, if wrappers have changed them, and what was renamed."""

    def fitting(candidate: Mapping[str, Any]) -> int:
        return len(expected & candidate.keys())

    best, notes, removed, current = state, list[str](), "", state
    while prefix := next((each for each in WRAPPER_PREFIXES if all(key.startswith(each) for key in current)), ""):
        current = _without_prefix(current, prefix)
        removed += prefix
        if fitting(current) > fitting(best):
            best, notes = current, [f"the prefix '{removed}' was removed from all keys"]
    whole = _renamed(best, lambda name: name.replace(_COMPILED, ""))
    if fitting(whole) > fitting(best):
        best, notes = whole, [*notes, f"'{_COMPILED}' was removed inside keys: parts of the model were compiled"]
    old = _renamed(best, _old_weight_norm)
    if fitting(old) > fitting(best):
        best, notes = old, [*notes, "weight normalisation was converted to weight_g and weight_v"]
    return best, notes


def _without_prefix(state: Mapping[str, Any], prefix: str) -> "OrderedDict[str, Any]":
    return _renamed(state, lambda name: name.removeprefix(prefix))


def _old_weight_norm(name: str) -> str:
    for new, old in _WEIGHT_NORM:
        if name.endswith(new):
            return name.removesuffix(new) + old
    return name


def _check_shapes(expected: Mapping[str, Any], state: Mapping[str, Any], path: Path) -> None:
    """Check the shapes and kinds of what both have; names are checked after torch has converted older forms."""
    both = [name for name in state if isinstance(expected.get(name), Tensor) and isinstance(state[name], Tensor)]
    both = [name for name in both if not nn.parameter.is_lazy(expected[name])]
    wrong = [
        name
        for name in both
        # torch 0.3 stored single numbers with one axis, and torch still takes them
        if state[name].shape != expected[name].shape and (state[name].shape, expected[name].shape) != ((1,), ())
    ]
    if wrong:
        name = wrong[0]
        raise ModelError(
            f"checkpoint '{path}' does not fit the model: '{name}' has shape {tuple(state[name].shape)}, the model "
            f"needs {tuple(expected[name].shape)} ({len(wrong)} shape(s) differ); use the arguments of its training"
        )
    for name in both:
        if state[name].is_complex() and not expected[name].is_complex():
            raise ModelError(
                f"checkpoint '{path}' does not fit the model: '{name}' is complex, the model's is "
                f"{expected[name].dtype}; use the builder that it was trained with"
            )


def _load(model: nn.Module, state: "OrderedDict[str, Any]", path: Path) -> list[str]:
    """Load by torch, which converts older forms, and check that no key is missing or left over."""
    try:
        result = model.load_state_dict(state, strict=False)
    except Exception as error:  # a shape behind a converted name, or a module's own code
        raise ModelError(
            f"checkpoint '{path}' does not fit the model: {one_line(error)}; use the builder and arguments that it was "
            "trained with"
        ) from error
    expected = model.state_dict()
    stored = {expected[name].data_ptr() for name in state if isinstance(expected.get(name), Tensor)}
    missing = [
        name
        for name in result.missing_keys
        if not (isinstance(expected.get(name), Tensor) and expected[name].data_ptr() in stored)
    ]
    counters = [name for name in missing if name.rpartition(".")[2] == _COUNTER]
    missing = [name for name in missing if name not in counters]
    if missing or result.unexpected_keys:
        _refuse_names(missing, result.unexpected_keys, path)
    return [f"{len(counters)} missing {_COUNTER} kept the value of the new model"] if counters else []


def _refuse_names(missing: list[str], unexpected: list[str], path: Path) -> None:
    parts = [
        f"{len(names)} {what} ({_first(names)})"
        for names, what in ((missing, "missing"), (unexpected, "unknown"))
        if names
    ]
    near = nearest_name(unexpected[0], missing) if unexpected else ""
    raise ModelError(
        f"checkpoint '{path}' does not fit the model: {' and '.join(parts)} key(s){near}; "
        "use the builder and arguments that it was trained with"
    )


def _copy(value: Any) -> Any:
    copied = isinstance(value, Tensor) and not nn.parameter.is_lazy(value)
    return value.detach().clone() if copied else value


def _first(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:3]) + (", …" if len(names) > 3 else "")
