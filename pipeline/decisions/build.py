"""From configuration to objects: the only module that makes a data set, a model or a `KernelSpec` from a `Config`.

Everything made here is a plain value or a module of torch; nothing here computes a kernel, opens a store or starts Ray.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nntk_dist.errors import ModelError
from nntk_dist.models.builders import build_model as build_by_name
from nntk_dist.models.builders import load_checkpoint
from nntk_dist.models.calling import Calling, frozen_parameters
from nntk_dist.models.evaluation import prepare_model
from nntk_dist.models.output import as_output
from nntk_dist.planning.plain import to_plain
from nntk_dist.spec import KernelSpec
from pipeline.config.kernel import KernelConfig
from pipeline.config.schema import Config
from pipeline.data import Dataset, load_dataset
from pipeline.data.packing import with_labels
from pipeline.decisions.function_values import NUM_ROWS, evaluate
from pipeline.job.function_values import FunctionValues
from pipeline.records.manifest import fingerprint

DTYPES = {"float32": torch.float32, "float64": torch.float64}
_MOST_EXACT = 1 << 26  # parameters of a model that is tried in float64: with gradients, 1 GiB


def build_dataset(config: Config) -> Dataset:
    """The examples of a run, selected, split and normalised. Raises `NNTKError` for a source that cannot be used."""
    data = config.data
    dataset = load_dataset(
        data.source,
        train=data.train,
        test=data.test,
        normalize=data.normalize,
        seed=data.seed,
        input_columns=data.input_columns,
        target_column=data.target_column,
        args=data.args,
    )
    return with_labels(dataset) if as_output(config.model.output).needs_labels else dataset


def build_architecture(config: Config, dataset: Dataset) -> nn.Module:
    """The network of a run with its initial parameters, float32 on the CPU."""
    section = config.model
    return build_by_name(
        section.builder,
        section.args,
        input_shape=dataset.input_shape,
        input_shapes=dataset.input_shapes,
        num_outputs=dataset.num_outputs,
        seed=section.seed,
    )


def build_model(config: Config, dataset: Dataset) -> nn.Module:
    """The network of a run with its initial or checkpointed parameters, float32 on the CPU.

    Raises:
        NNTKError: the builder or the checkpoint fails, or a lazy module has not been called.
    """
    model = build_architecture(config, dataset)
    if config.model.checkpoint is not None:
        load_checkpoint(model, config.model.checkpoint)
    lazy = next((name for name, parameter in model.named_parameters() if nn.parameter.is_lazy(parameter)), None)
    if lazy is not None:
        raise ModelError(
            f"parameter '{lazy}' of model {config.model.builder} has no shape yet; call the model once on an example "
            "in its builder, or give a checkpoint"
        )
    return model


def build_prepared(
    config: Config, dataset: Dataset, model: nn.Module, device: str, dtype: torch.dtype | None = None
) -> nn.Module:
    """Return a private copy of the run's model that is ready to be evaluated, in the run's dtype or in another one."""
    calling = Calling.choose(model, dataset.layout, as_output(config.model.output))
    return prepare_model(model, dtype=dtype or DTYPES[config.compute.dtype], device=device, calling=calling)


def function_values(config: Config, dataset: Dataset, model: nn.Module) -> FunctionValues:
    """Evaluate f, the score of draws and their distribution on the first training rows.

    Raises:
        NNTKError: the model or the score fails on them.
    """
    return evaluate(
        lambda dtype, device: build_prepared(config, dataset, model, device, dtype),
        DTYPES[config.compute.dtype],
        resolve_device(config),
        torch.from_numpy(dataset.train.inputs[:NUM_ROWS]),
        torch.from_numpy(dataset.train.targets[:NUM_ROWS]),
        build_spec(config.kernel),
        exact=sum(parameter.numel() for parameter in model.parameters()) <= _MOST_EXACT,
        advice=_advice(dataset),
    )


def _advice(dataset: Dataset) -> str:
    """What to know of inputs that are no floating-point numbers, if a model fails on them."""
    if dataset.layout is not None:
        return f"; the examples have the parts {dataset.layout}"
    if dataset.train.inputs.dtype == np.float32:
        return ""
    return (
        f"; they are whole numbers ({dataset.train.inputs.dtype}), as the source holds them: if they are features and "
        "no ids, store them as floating-point numbers, or set data.args={dtype: float32} for a table"
    )


def build_spec(kernel: KernelConfig) -> KernelSpec:
    """Return the kernel's description in the library's terms."""
    return kernel.spec()


def resolve_device(config: Config) -> str:
    """Return the device; `auto` means the GPU if torch sees one on this machine, otherwise the CPU."""
    if config.compute.device != "auto":
        return config.compute.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def identity(config: Config, dataset: Dataset, model: nn.Module) -> dict[str, object]:
    """What a kernel is a function of, in nameable parts: content of the data, the model and its parameters, values of f
    and of the score on a few rows, kernel, dtype.
    """
    splits = {name: getattr(dataset, name) for name in ("train", "test")}
    contents = {
        f"{name}.{field}": _digest(getattr(split, field))
        for name, split in splits.items()
        for field in ("ids", "inputs", "targets")
    }
    if dataset.layout is not None:
        contents["parts"] = str(dataset.layout)
    frozen = sorted(frozen_parameters(model))
    return {
        "data": contents,
        "model": {
            "builder": config.model.builder,
            "args": json.loads(json.dumps(config.model.args)),
            "output": config.model.output,
            "parameters": fingerprint(_arrays(model.state_dict())),
            "frozen": _digest(frozen) if frozen else None,
        },
        "function": to_plain(function_values(config, dataset, model)),
        "kernel": config.kernel.model_dump(mode="json"),
        "dtype": config.compute.dtype,
    }


def _arrays(state: Mapping[str, Any]) -> dict[str, object]:
    """The tensors of a state dict as arrays; what else a module keeps there shows in the values of f."""
    tensors = {name: value.detach().cpu() for name, value in state.items() if isinstance(value, Tensor)}
    return {name: [str(value.dtype), _array(value)] for name, value in tensors.items()}


def _array(values: Tensor) -> np.ndarray:
    """A tensor as an array; types that NumPy lacks as bytes."""
    try:
        return values.numpy()
    except TypeError:
        return values.reshape(-1).contiguous().view(torch.uint8).numpy()


def _digest(array: object) -> str:
    return fingerprint({"content": array})[:16]


def state_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(each.numel() * each.element_size() for each in model.state_dict().values() if isinstance(each, Tensor))
