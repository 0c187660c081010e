"""From configuration to objects: the only module that makes a data set, a model or a `KernelSpec` from a `Config`.

Everything made here is a plain value or a module of torch; nothing here computes a kernel, opens a store or starts Ray.
"""

import inspect
import json

import torch
from torch import nn

from nntk_dist.models.builders import build_model as build_by_name
from nntk_dist.models.builders import load_checkpoint
from nntk_dist.models.calling import Calling
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.models.output import as_output
from nntk_dist.registration.callables import import_function
from nntk_dist.registration.registry import PYTHON
from nntk_dist.spec import KernelSpec
from pipeline.config.kernel import KernelConfig
from pipeline.config.schema import Config
from pipeline.data import Dataset, load_dataset
from pipeline.records.manifest import fingerprint

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def build_dataset(config: Config) -> Dataset:
    """The examples of a run, selected, split and normalised. Raises `NNTKError` for a source that cannot be used."""
    data = config.data
    return load_dataset(
        data.source,
        train=data.train,
        test=data.test,
        normalize=data.normalize,
        seed=data.seed,
        input_columns=data.input_columns,
        target_column=data.target_column,
        args=data.args,
    )


def build_architecture(config: Config, dataset: Dataset) -> nn.Module:
    """The network of a run with its initial parameters, float32 on the CPU."""
    section = config.model
    return build_by_name(
        section.builder,
        section.args,
        input_shape=dataset.input_shape,
        num_outputs=dataset.num_outputs,
        seed=section.seed,
    )


def build_model(config: Config, dataset: Dataset) -> nn.Module:
    """The network of a run with its initial or checkpointed parameters, float32 on the CPU."""
    model = build_architecture(config, dataset)
    if config.model.checkpoint is not None:
        load_checkpoint(model, config.model.checkpoint)
    return model


def build_prepared(config: Config, model: nn.Module, device: str) -> nn.Module:
    """Return a private copy of the run's model that is ready to be evaluated, as the configuration says."""
    calling = Calling.choose(model, None, as_output(config.model.output))
    return prepare_model(model, dtype=DTYPES[config.compute.dtype], device=device, calling=calling)


def build_spec(kernel: KernelConfig) -> KernelSpec:
    """Return the kernel's description in the library's terms."""
    return kernel.spec()


def resolve_device(config: Config) -> str:
    """Return the device; `auto` means the GPU if torch sees one on this machine, otherwise the CPU."""
    if config.compute.device != "auto":
        return config.compute.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def identity(config: Config, dataset: Dataset, model: nn.Module) -> dict[str, object]:
    """What a kernel is a function of, in nameable parts: content of the data, the model and its parameters, kernel,
    dtype.
    """
    splits = {name: getattr(dataset, name) for name in ("train", "test")}
    contents = {
        f"{name}.{field}": _digest(getattr(split, field))
        for name, split in splits.items()
        for field in ("ids", "inputs", "targets")
    }
    state = {name: value.detach().cpu().numpy() for name, value in model.state_dict().items()}
    return {
        "data": contents,
        "model": {
            "builder": config.model.builder,
            "args": json.loads(json.dumps(config.model.args)),
            "output": config.model.output,
            "parameters": fingerprint(state),
        },
        "kernel": config.kernel.model_dump(mode="json") | _score_content(config.kernel),
        "dtype": config.compute.dtype,
    }


def _score_content(kernel: KernelConfig) -> dict[str, str]:
    """The source code of a user's score, without the functions that it calls: the name may later mean another one."""
    name = kernel.weighting.name
    if not name.startswith(PYTHON):
        return {}
    function = import_function(name.removeprefix(PYTHON), what="weighting")
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):  # not written in a file, or not in Python
        source = ""
    return {"weighting_function": _digest(source)}


def _digest(array: object) -> str:
    return fingerprint({"content": array})[:16]


def state_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())
