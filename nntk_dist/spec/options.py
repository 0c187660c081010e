"""The options of each kind of kernel, read from `KernelSpec`: signatures, specs made from arguments, reference rows.

Axes: none.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from nntk_dist.errors import ArgumentError, nearest_name
from nntk_dist.registration.options import Option, OptionRow, option_rows, options_of
from nntk_dist.sampling.laws import has_gamma
from nntk_dist.spec.choices import Kind, Statistic
from nntk_dist.spec.kernel_spec import KernelSpec


def kernel_options(kind: str | None = None) -> dict[str, Option]:
    """Return the options that a kind of kernel has.

    Args:
        kind: the kind; by default all options, `kind` among them.

    Example:
        >>> list(kernel_options("local"))
        ['outputs', 'contraction', 'sketch', 'parameters', 'seed']
    """
    declared = options_of(KernelSpec)
    return {name: each for name, each in declared.items() if kind is None or kind in each.facts["kinds"]}


def plain_default(declared: Option) -> Any:
    """Return an option's default in Python functions, an enum as its text."""
    default = declared.facts.get("in_call", declared.default)
    return str(default) if isinstance(default, str) else default


def kernel_signature(kind: str | None, function: Callable[..., Any]) -> inspect.Signature:
    """Return a function's signature with the options of a kind of kernel in place of `**options`.

    Args:
        kind: the kind; by default all options.
        function: what takes them; its own keyword parameters stand behind them.
    """
    written = inspect.signature(function)
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=plain_default(each),
            annotation=each.facts.get("argument", KernelSpec.__annotations__[name]),
        )
        for name, each in kernel_options(kind).items()
        if "only_in_configuration" not in each.facts
    ]
    own = [each for each in written.parameters.values() if each.kind is not each.VAR_KEYWORD]
    before = [each for each in own if each.kind is each.POSITIONAL_OR_KEYWORD]
    return written.replace(parameters=[*before, *options, *own[len(before) :]])


def make_spec(kind: str | None, options: Mapping[str, Any], *, called: str) -> KernelSpec:
    """Return the kernel that the arguments of a Python function describe.

    Args:
        kind: the kind of kernel; None takes it from the options.
        options: the keyword arguments.
        called: the function's name, for messages.

    Raises:
        ArgumentError: an option does not exist or does not apply, γ is missing, or as `KernelSpec`.
    """
    kind = options.get("kind", Kind.NONLOCAL) if kind is None else kind
    allowed, every = kernel_options(kind), kernel_options()
    for name in options:
        if name == "kind":
            continue
        if name in every and name not in allowed:
            raise ArgumentError(f"{name} is not an option of {called}, kind {kind}; allowed: {', '.join(allowed)}")
        if name not in allowed:
            raise ArgumentError(
                f"{called} has no option '{name}'; allowed: {', '.join(allowed)}{nearest_name(name, allowed)}"
            )
    values = {name: plain_default(each) for name, each in allowed.items()} | dict(options)
    if "gamma" in allowed and values["gamma"] is None and not has_gamma(values["distribution"]):
        raise ArgumentError(
            f"gamma is missing; give {called} the range of the perturbations, such as gamma=0.1, or a distribution "
            "that has one, such as Gaussian(gamma=0.1)"
        )
    if kind != Kind.NONLOCAL:
        values["statistic"] = Statistic.PLUGIN
    return KernelSpec(**values | {"kind": kind})


def kernel_option_rows(kind: str | None = None) -> Iterator[OptionRow]:
    """Yield a row for each kernel option: name, what is allowed, default and meaning, for the reference page.

    Args:
        kind: the kind of kernel, for the defaults of its function; by default all options, with the defaults of the
            configuration.

    Example:
        >>> {row.name: row.default for row in kernel_option_rows()}["max_draws"]
        '65536'
    """
    rows = option_rows(KernelSpec, tuple(kernel_options(kind)))
    if kind is None:
        yield from rows
        return
    options = kernel_options(kind)
    yield from (replace(row, default=repr(plain_default(options[row.name]))) for row in rows)
