"""The configuration of a run: every key, its default, and what is allowed there; from a YAML file to one frozen value.

Checks what can be checked without data, model or store, and turns each mistake into one line (`ArgumentError`: file,
dotted key, what came, what is allowed, the nearest valid name). Builds no data set, model or kernel.

Legend: each field's description is the text that an error message gives as allowed; a field of an enum or a `Literal`
needs none, because its values are the text. Units stand in the names (`_bytes`). `auto` leaves the choice to the plan,
which reports its choice and the reason.
"""

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, Field, JsonValue, Strict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from nntk_dist.analysis.regression.conjugate_gradients import ConjugateGradients
from nntk_dist.analysis.solvers import REGRESSION_SOLVERS, SPECTRUM_SOLVERS
from nntk_dist.errors import ArgumentError, nearest_name
from pipeline.config.choices import ExecutorChoice, StandardErrorChoice
from pipeline.config.kernel import KernelConfig
from pipeline.config.overrides import Override, apply_overrides, read_document, read_overrides, show, unknown_key
from pipeline.config.types import (
    Count,
    CountOrAll,
    CountOrAuto,
    Flag,
    MemoryOrAuto,
    Names,
    OutputChoice,
    PositiveNumber,
    Section,
    Seed,
    Text,
    names_in,
    registered,
)


class DataConfig(Section):
    """Where the examples come from and which of them take part."""

    source: Annotated[Text, Field(description="KIND:PLACE, such as sklearn:digits, csv:FILE or parquet:FOLDER")]
    train: CountOrAll = None
    test: CountOrAll = None
    normalize: Flag = True
    seed: Seed = 0
    input_columns: Annotated[
        Names | None, Field(description="a list of column names, or null for all but the target")
    ] = None
    target_column: Annotated[Text | None, Field(description="a column name, or null to find it by its usual names")] = (
        None
    )
    args: Annotated[
        dict[str, JsonValue], Field(default_factory=dict, description="a mapping of the source's own arguments")
    ]


class ModelConfig(Section):
    """The network whose kernel is computed."""

    builder: Annotated[Text, Field(description="a built-in model, such as mlp or cnn, or python:module:function")]
    args: Annotated[
        dict[str, JsonValue], Field(default_factory=dict, description="a mapping of the builder's own arguments")
    ]
    seed: Seed = 0
    checkpoint: Annotated[Text | None, Field(description="the path of a checkpoint, or null for fresh parameters")] = (
        None
    )
    output: OutputChoice = None


class ComputeConfig(Section):
    """How the work is carried out; beyond `dtype`, nothing here changes what is computed, only its rounding."""

    executor: Annotated[ExecutorChoice, Strict(False)] = ExecutorChoice.RAY
    workers: CountOrAuto = "auto"
    threads: CountOrAuto = "auto"
    workers_per_gpu: Count = 1
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$", description="auto, cpu, cuda, cuda:N")] = (
        "auto"
    )
    dtype: Literal["float32", "float64"] = "float32"
    tile: Count = 1024
    batch: CountOrAuto = "auto"
    memory_per_worker: MemoryOrAuto = "auto"
    write_tiles: Annotated[
        Literal["auto"] | Annotated[bool, Strict()],
        Field(description="auto, true, or false (of kernels with a factor, from which the later stages work then)"),
    ] = "auto"
    stderr: Annotated[StandardErrorChoice, Strict(False)] = StandardErrorChoice.ENTRY
    matmul_precision: Literal["highest", "high", "medium"] = "highest"


Arguments = Annotated[dict[str, JsonValue], Field(description="a mapping of the solver's own arguments")]


class SpectrumConfig(Section):
    """The eigenvalues, and how many eigenvectors to keep; an iterative solver finds `top_k` eigenvalues alone."""

    method: Annotated[
        str,
        registered("spectrum.method", SPECTRUM_SOLVERS, "auto"),
        Field(description=names_in(SPECTRUM_SOLVERS, "auto")),
    ] = "auto"
    args: Arguments = Field(default_factory=dict)
    top_k: Count = 50


class RegressionConfig(Section):
    """Kernel ridge regression; a ridge is relative: K + ridge * (tr K / n) * I. Iterative solvers take `tolerance`."""

    method: Annotated[
        str,
        registered("regression.method", REGRESSION_SOLVERS, "auto"),
        Field(description=names_in(REGRESSION_SOLVERS, "auto")),
    ] = "auto"
    args: Arguments = Field(default_factory=dict)
    tolerance: PositiveNumber = ConjugateGradients().tolerance
    ridge: Annotated[
        tuple[PositiveNumber, ...],
        Strict(False),
        Field(min_length=1, description="a list of one or more numbers above 0"),
    ] = (1.0e-4, 1.0e-3, 1.0e-2, 1.0e-1, 1.0)
    center_outputs: Flag = False


class ReportConfig(Section):
    """What the report page shows."""

    plots: Annotated[
        Annotated[bool, Strict()] | Annotated[tuple[Text, ...], Strict(False)],
        Field(description="true or false, or a list of names of plots, or python:module:function"),
    ] = True


class Config(Section):
    """A whole run."""

    name: Annotated[Text, Field(description="a name for the run, on one line")]
    run_dir: Annotated[Text, Field(description="where the run is written: a local path or s3://bucket/prefix")]
    data: DataConfig
    model: ModelConfig
    kernel: KernelConfig = KernelConfig()
    compute: ComputeConfig = ComputeConfig()
    spectrum: SpectrumConfig = SpectrumConfig()
    regression: RegressionConfig = RegressionConfig()
    report: ReportConfig = ReportConfig()
    stages: Annotated[
        tuple[Text, ...],
        Strict(False),
        Field(description="a list of additional stages, each python:module:Name"),
    ] = ()


def load_config(path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """Read a configuration from a YAML file.

    Args:
        path: of the file.
        overrides: laid over it, in order: texts such as `kernel.seed=1`, or a mapping from dotted keys to values.

    Raises:
        ArgumentError: one line that says what is wrong in the file, in an override or with a value, and what is
            allowed.
    """
    path = Path(path)
    return _merged(read_document(path), str(path), overrides)


def config_from_dict(document: Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """Make a configuration of plain values, such as those of `model_dump(mode="json")` in a manifest.

    Takes overrides and raises as `load_config` does.
    """
    return _merged(document, "configuration", overrides)


def _merged(document: Mapping[str, Any], where: str, overrides: Sequence[str] | Mapping[str, Any]) -> Config:
    """The document under its overrides, validated."""
    read = read_overrides(overrides)
    return _validated(apply_overrides(document, read, _defaults(Config)), where, read)


def _validated(document: Mapping[str, Any], where: str, overrides: Sequence[Override]) -> Config:
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        details = error.errors(include_url=False)
    # A mistyped key is the likely cause of other missing keys, so the message names it first.
    first = min(details, key=lambda detail: detail["type"] != "extra_forbidden")
    key, message = _explain(first)
    blamed = [override.source for override in overrides if f"{key}.".startswith(f"{override.key}.")]
    source = blamed[-1] if blamed else where
    faulty_keys = {_explain(detail)[0] for detail in details}
    others = f" (and {len(faulty_keys) - 1} more)" if len(faulty_keys) > 1 else ""
    raise ArgumentError(f"{source}: {message}{others}")


def _explain(detail: ErrorDetails) -> tuple[str, str]:
    """The dotted key of a validation error, and the message."""
    keys: list[str] = []
    section: type[BaseModel] | None = Config
    field: FieldInfo | None = None
    for part in detail["loc"]:
        if isinstance(part, int):
            keys.append(str(part))
        elif section is not None and part in section.model_fields:
            keys.append(part)
            field = section.model_fields[part]
            section = _section_of(field)
        else:  # the name of a union's branch, a key that does not exist, or one inside a free mapping
            break
    key = ".".join(keys)
    if detail["type"] == "extra_forbidden" and section is not None:
        return key, unknown_key(str(detail["loc"][-1]), key, section.model_fields)
    if detail["type"] == "value_error":  # a check across keys, which names them itself
        message = str(detail["ctx"]["error"])
        named = message.partition(" ")[0]
        return (named if named.startswith(f"{key}.") else key), message
    if detail["type"] == "missing":
        return key, f"{key} is missing; allowed: {_allowed(field)}"
    value = detail["input"]
    annotation = field.annotation if field is not None else None
    unavailable = ", not available in this version" if _is_choice(annotation) and isinstance(value, str) else ""
    choices = detail.get("ctx", {}).get("words") or _choices(annotation)
    hint = nearest_name(value, choices) if isinstance(value, str) else ""
    return key, f"{key} is {show(value)}{unavailable}; allowed: {_allowed(field)}{hint}"


def _allowed(field: FieldInfo | None) -> str:
    if field is None:
        return f"a mapping with the keys {', '.join(Config.model_fields)}"
    section = _section_of(field)
    if section is not None:
        return f"a mapping with the keys {', '.join(section.model_fields)}"
    return field.description or ", ".join(_choices(field.annotation))


def _is_enum(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Enum)


def _is_choice(annotation: Any) -> bool:
    return _is_enum(annotation) or get_origin(annotation) is Literal


def _choices(annotation: Any) -> list[str]:
    """The texts that enums and `Literal` types within `annotation` allow."""
    if _is_enum(annotation):
        return [str(choice.value) for choice in annotation]
    inner = get_args(annotation)
    if get_origin(annotation) is Literal:
        return [choice for choice in inner if isinstance(choice, str)]
    return [choice for part in inner for choice in _choices(part)]


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _defaults(section: type[BaseModel]) -> dict[str, Any]:
    """Every key below `section` with its default as YAML would hold it; null if there is none."""

    def default(field: FieldInfo) -> Any:
        inner = _section_of(field)
        if inner is not None:
            return _defaults(inner)
        value = None if field.is_required() else field.get_default(call_default_factory=True)
        return list(value) if isinstance(value, tuple) else value

    return {name: default(field) for name, field in section.model_fields.items()}
