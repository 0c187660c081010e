"""Read a configuration file and lay overrides such as `a.b=v` over it: text in, plain mappings and lists out.

It knows nothing of what the keys mean beyond a tree of defaults that names them, and validates no value: that is
`pipeline.config.schema`'s part. Every fault is an `ArgumentError` of one line.

Legend: a *document* is what the YAML holds (mappings, lists, scalars); a *key* is dotted (`regression.ridge.0`).
"""

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nntk_dist.errors import ArgumentError, nearest_name

_TAG = "tag:yaml.org,2002"  # of YAML's own types


class ConfigLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2 and with repeated keys refused.

    YAML 1.1, PyYAML's default, reads `1e-4` as text, `no` and `off` as false, `1:30` as 90 and `2024-01-01` as a date;
    a configuration never means any of these.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping at `node`; a key that stands there twice is an error, not a silent overwrite."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            is_text = key_node.tag in (f"{_TAG}:str", f"{_TAG}:merge")
            problem = f"the key '{key}' stands here twice" if key in seen else "a key that is not text"
            if not is_text or key in seen:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


ConfigLoader.yaml_implicit_resolvers = {}  # forget the rules of 1.1
for _name, _pattern, _first_characters in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    ConfigLoader.add_implicit_resolver(f"{_TAG}:{_name}", re.compile(f"^({_pattern})$"), _first_characters)


def read_document(path: Path) -> dict[str, Any]:
    """The mapping that the YAML file at `path` holds.

    Raises:
        ArgumentError: no such file, a folder, unreadable, not UTF-8, not YAML (with the line), empty, or not a mapping.
    """
    if path.is_dir():
        example = path / "digits.yaml"
        raise ArgumentError(f"{path}: this is a folder; name a configuration file in it, such as {example}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [sibling.name for sibling in path.parent.glob("*.yaml")]
        raise ArgumentError(f"{path}: no such configuration file{nearest_name(path.name, siblings)}") from None
    except UnicodeDecodeError:
        raise ArgumentError(f"{path}: this is not UTF-8 text; a configuration is a YAML text file") from None
    except OSError as error:
        raise ArgumentError(f"{path}: cannot be read: {error.strerror}; check its permissions") from None
    document = _parse(text, where=str(path))
    if document is None:
        raise ArgumentError(f"{path}: the file is empty; a configuration needs at least name, run_dir, data and model")
    if not isinstance(document, dict):
        raise ArgumentError(
            f"{path}: the file holds {show(document)}; a configuration is a mapping, `key: value` by line"
        )
    return document


@dataclass(frozen=True)
class Override:
    """A value for a dotted key.

    Attributes:
        key: such as `kernel.distribution.gamma`.
        value: what stands there instead.
        source: how the user gave it, for messages.
    """

    key: str
    value: Any
    source: str


def read_overrides(overrides: Sequence[str] | Mapping[str, Any]) -> tuple[Override, ...]:
    """Read overrides: texts `a.b=v` of the command line, with values in YAML, or a mapping from dotted keys to values.

    Raises:
        ArgumentError: no `=`, an empty key, or a value that is not YAML.
    """
    if isinstance(overrides, Mapping):
        read = [Override(str(key), value, f"override {key}") for key, value in overrides.items()]
    else:
        read = []
        for text in overrides:
            key, equals, value = text.partition("=")
            source = f"--set {text}"
            read.append(Override(key if equals else "", _parse(value, where=source), source))
    for override in read:
        if not all(override.key.split(".")):
            raise ArgumentError(
                f"{override.source}: expected KEY=VALUE with a dotted key, such as kernel.distribution.gamma=0.1"
            )
    return tuple(read)


def apply_overrides(
    document: Mapping[str, Any], overrides: Sequence[Override], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a copy of `document` with each override laid over it, in order.

    A part of a key that meets a list is an index into it. A list that the document leaves out starts as its default.

    Args:
        document: what the configuration file holds.
        overrides: what is laid over it.
        defaults: every key that exists; an empty mapping in it takes any key.

    Raises:
        ArgumentError: an unknown key (with the nearest one), or an index out of range.
    """
    result = dict(document)
    for override in overrides:
        try:
            result = _with_value(result, defaults, override.key.split("."), override.value)
        except ArgumentError as error:
            raise ArgumentError(f"{override.source}: {error}") from None
    return result


def show(value: object) -> str:
    """`value` as an error message shows it: on one line, in YAML's words, shortened past 60 characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = " ".join((f"'{value}'" if isinstance(value, str) else repr(value)).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=ConfigLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark is not None else ""
        is_syntax = isinstance(error, yaml.scanner.ScannerError | yaml.parser.ParserError)
        hint = "; put text with special characters in quotes" if is_syntax else ""
        raise ArgumentError(f"{where}: {line}not valid YAML: {error.problem}{hint}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ArgumentError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _with_value(node: Any, known: Any, parts: Sequence[str], value: Any, done: tuple[str, ...] = ()) -> Any:
    """`node`, which stands at the key `done` and for which `known` is the default, with `value` at `parts` below it."""
    if not parts:
        return value
    part, rest = parts[0], parts[1:]
    parent = ".".join(done)
    if node is None:  # left out, so start from the default; a mapping of defaults is not copied into the document
        node = {} if isinstance(known, Mapping) else known
    if isinstance(node, list):
        if not part.isdecimal() or int(part) >= len(node):
            raise ArgumentError(
                f"{parent} is a list of {len(node)}; allowed in place of '{part}': an index from 0 below that"
            )
        index = int(part)
        return [*node[:index], _with_value(node[index], {}, rest, value, (*done, part)), *node[index + 1 :]]
    if not isinstance(node, Mapping):
        raise ArgumentError(f"{parent} is {show(node)}, a single value: it has no key '{part}' below it")
    names = known if isinstance(known, Mapping) else {}
    if names and part not in names:
        raise ArgumentError(unknown_key(part, parent, names))
    return {**node, part: _with_value(node.get(part), names.get(part, {}), rest, value, (*done, part))}


def unknown_key(name: str, parent: str, allowed: Mapping[str, Any]) -> str:
    """What to say of a key that does not exist: its full name, those that do, and the nearest."""
    key = f"{parent}.{name}" if parent else name
    where = f" in {parent}" if parent else ""
    return f"unknown key {key}; allowed{where}: {', '.join(allowed)}{nearest_name(name, allowed)}"
