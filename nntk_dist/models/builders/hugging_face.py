"""Models of Hugging Face's transformers from a local folder: `hf:FOLDER` with config.json and safetensors files.

Only local files are read, and no code from the folder is run. The model returns what its class returns; `model.output`
chooses f.

Axes: none.
"""

import json
from pathlib import Path
from typing import Any

from torch import nn

from nntk_dist.errors import ArgumentError, ModelError, nearest_name, one_line


def hugging_face(location: str, *, architecture: str | None = None, random: bool = False) -> nn.Module:
    """Load a model of transformers from a folder.

    Args:
        location: the folder, as `save_pretrained` writes it.
        architecture: the name of a class of transformers; by default the one that config.json names.
        random: build the model of config.json with random parameters, and read no weights.

    Raises:
        ArgumentError: there is no such folder, it has no config.json or no weights, transformers lacks the class, or is
            not installed.
        ModelError: transformers cannot load the model.
    """
    folder = Path(location).expanduser()
    settings = folder / "config.json"
    if not settings.is_file():
        what = "no such folder" if not folder.is_dir() else "the folder has no config.json"
        raise ArgumentError(f"model hf:{location}: {what}; give a folder that save_pretrained wrote")
    if not random and not any(folder.glob("*.safetensors")):
        raise ArgumentError(
            f"model hf:{location}: the folder has no .safetensors file; save the weights there, or set random: true"
        )
    try:
        import transformers
    except ImportError as error:
        raise ArgumentError(
            f"model hf:{location} needs transformers ({one_line(error)}); pip install 'nntk-dist[hf]'"
        ) from error
    try:
        names = [architecture] if architecture is not None else json.loads(settings.read_text())["architectures"]
        name = names[0]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ArgumentError(
            f"model hf:{location}: config.json names no architecture; give one as the argument architecture"
        ) from error
    found: Any = getattr(transformers, str(name), None)
    if found is None:
        known = [each for each in dir(transformers) if each.endswith(("Model", "LM", "Classification"))]
        raise ArgumentError(f"model hf:{location}: transformers has no class '{name}'{nearest_name(str(name), known)}")
    log = transformers.utils.logging
    shows_progress = log.is_progress_bar_enabled()
    log.disable_progress_bar()  # a worker writes to the driver's display
    try:
        if random:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            model = found(config)
        else:
            model = found.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except Exception as error:  # transformers raises anything
        raise ModelError(f"model hf:{location} cannot be loaded: {type(error).__name__}: {one_line(error)}") from error
    finally:
        if shows_progress:
            log.enable_progress_bar()
    assert isinstance(model, nn.Module)
    return model
