"""A griffe extension: signatures and docstrings that are made when a module is imported, as they are then.

The public functions take the options that `nntk_dist.spec` declares. Their source alone shows `**options`.
"""

import inspect
import re
from typing import Any

from griffe import Docstring, Extension, Function, GriffeLoader, Parameter, ParameterKind, Parameters, dynamic_import

MODULE = "nntk_dist.kernels.functions"
_MODULES = re.compile(r"\b(?:\w+\.)+(?=\w)")
_KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: ParameterKind.positional_only,
    inspect.Parameter.POSITIONAL_OR_KEYWORD: ParameterKind.positional_or_keyword,
    inspect.Parameter.VAR_POSITIONAL: ParameterKind.var_positional,
    inspect.Parameter.KEYWORD_ONLY: ParameterKind.keyword_only,
    inspect.Parameter.VAR_KEYWORD: ParameterKind.var_keyword,
}


class RuntimeSignatures(Extension):
    """Take signature and docstring of the functions in `MODULE` from the imported functions."""

    def on_function(self, *, func: Function, loader: GriffeLoader, **kwargs: Any) -> None:
        """Do so for one function."""
        if func.path.rpartition(".")[0] != MODULE or func.name.startswith("_"):
            return
        function = dynamic_import(func.path)
        written = {parameter.name: parameter for parameter in func.parameters}
        func.parameters = Parameters(
            *(_parameter(each, written) for each in inspect.signature(function).parameters.values())
        )
        if func.docstring is not None and function.__doc__:
            func.docstring = Docstring(inspect.cleandoc(function.__doc__), lineno=func.docstring.lineno, parent=func)


def _parameter(found: inspect.Parameter, written: dict[str, Parameter]) -> Parameter:
    """A parameter as the source writes it; one that only the imported function has, from its own values."""
    if found.name in written:
        return written[found.name]
    required = found.default is inspect.Parameter.empty
    annotation = found.annotation if isinstance(found.annotation, str) else inspect.formatannotation(found.annotation)
    return Parameter(
        found.name,
        annotation=None if found.annotation is inspect.Parameter.empty else _MODULES.sub("", annotation),
        kind=_KINDS[found.kind],
        default=None if required else repr(found.default),
    )
