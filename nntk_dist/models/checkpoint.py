"""Reading trained parameters into a model, from safetensors files and from `torch.save` files.

No code of a file is run (`weights_only=True`), and no part is loaded: every key and shape must match.

Axes: none.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nntk_dist.errors import ArgumentError, ModelError, nearest_name

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
NESTED_KEYS = ("state_dict", "model")


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Replace the parameters and buffers of a model, in place, by those stored in a file.

    The file contains a state dict, bare or under the key `state_dict` or `model`. Values are converted to the model's
    types. A tied parameter may be stored under only one of its names.

    Args:
        model: changed in place.
        path: `.safetensors`, or `.pt`, `.pth`, `.ckpt`, `.bin` for files of `torch.save`.

    Raises:
        ArgumentError: the file is missing, unreadable or of another format.
        ModelError: a key or a shape differs from the model's.
    """
    path = Path(path)
    state = _state_dict(_read(path), path)
    _check_match(model.state_dict(), state, path)
    model.load_state_dict(state, strict=False)  # `_check_match` has just been stricter


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
        raise ArgumentError(
            f"checkpoint '{path}' cannot be read by torch.load(weights_only=True) ({type(error).__name__}); "
            "save it again with torch.save(model.state_dict(), path)"
        ) from error


def _state_dict(content: Any, path: Path) -> Mapping[str, Tensor]:
    if isinstance(content, Mapping):
        nested = next((content[key] for key in NESTED_KEYS if isinstance(content.get(key), Mapping)), content)
        if nested and all(isinstance(value, Tensor) for value in nested.values()):
            return nested
    raise ArgumentError(
        f"checkpoint '{path}' holds no state dict of tensors, neither bare nor under {' or '.join(NESTED_KEYS)}; "
        "save it with torch.save(model.state_dict(), path)"
    )


def _check_match(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    stored = {expected[name].data_ptr() for name in state if name in expected}
    missing = [name for name in expected if name not in state and expected[name].data_ptr() not in stored]
    unexpected = [name for name in state if name not in expected]
    if missing or unexpected:
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
    wrong = [name for name in state if state[name].shape != expected[name].shape]
    if wrong:
        name = wrong[0]
        raise ModelError(
            f"checkpoint '{path}' does not fit the model: '{name}' has shape {tuple(state[name].shape)}, the model "
            f"needs {tuple(expected[name].shape)} ({len(wrong)} shape(s) differ); use the arguments of its training"
        )


def _first(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:3]) + (", …" if len(names) > 3 else "")
