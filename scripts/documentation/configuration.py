"""The configuration reference: a table for every section, made from the schema and from `configs/digits.yaml`.

Defaults and allowed values come from the fields of the schema; the meaning of a key is its comment in the example.
"""

import json
import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.config.schema import Config

EXAMPLE = Path(__file__).resolve().parents[2] / "configs" / "digits.yaml"
_KEY = re.compile(r"^(?P<indent> *)(?P<key>\w+):(?P<rest>.*)$")
_COMMENT = re.compile(r"(?:^|\s)#\s?(?P<text>.*)$")


def configuration_reference() -> str:
    """Return the reference in Markdown: the keys of a whole run, then a heading and a table for every section."""
    meanings = explained_keys(EXAMPLE.read_text())
    return "\n".join(_section(Config, "", meanings))


def explained_keys(document: str) -> Mapping[str, str]:
    r"""Return the comment behind every key of a YAML document, by dotted key; comments may run on over lines.

    Example:
        >>> explained_keys("kernel:\n  seed: 0   # the perturbations\n")
        {'kernel.seed': 'the perturbations'}
    """
    meanings: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    last = ""
    for line in document.splitlines():
        comment = _COMMENT.search(line)
        text = comment.group("text").strip() if comment else ""
        if found := _KEY.match(line):
            indent = len(found.group("indent"))
            above = [each for each in above if each[0] < indent]
            above.append((indent, found.group("key")))
            last = ".".join(key for _, key in above)
            if text:
                meanings[last] = text
        elif text and last and line.startswith(" " * 20):
            meanings[last] = f"{meanings.get(last, '')} {text}".strip()
    return meanings


def all_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Iterate over every dotted key of the schema that holds a value, in its order."""
    for name, field in section.model_fields.items():
        inner = _section_of(field)
        if inner is None:
            yield prefix + name
        else:
            yield from all_keys(inner, f"{prefix}{name}.")


def _section(section: type[BaseModel], prefix: str, meanings: Mapping[str, str]) -> Iterator[str]:
    fields = section.model_fields
    if prefix:
        yield from (f"{'#' * (prefix.count('.') + 1)} `{prefix.rstrip('.')}`", "")
    yield from (_escaped(_sentences(section.__doc__)), "")
    values = {name: field for name, field in fields.items() if _section_of(field) is None}
    if values:
        yield from ("| key | default | allowed | meaning |", "|---|---|---|---|")
    for name, field in values.items():
        key = prefix + name
        cells = (f"`{key}`", _default(field), _allowed(field), meanings.get(key, ""))
        yield f"| {' | '.join(_escaped(cell) for cell in cells)} |"
    yield ""
    for name, field in fields.items():
        if inner := _section_of(field):
            yield from _section(inner, f"{prefix}{name}.", meanings)


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return f"`{json.dumps(plain, default=str)}`".replace('"', "") if not isinstance(plain, str) else f"`{plain}`"


def _allowed(field: FieldInfo) -> str:
    return field.description or ", ".join(f"`{each}`" for each in _choices(field.annotation))


def _choices(annotation: Any) -> Iterator[str]:
    """The values of `Literal` and enum types within an annotation."""
    if get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
    elif isinstance(annotation, type) and hasattr(annotation, "__members__"):
        yield from (str(member.value) for member in annotation.__members__.values())
    elif get_origin(annotation) in (Union, types.UnionType) or get_args(annotation):
        for part in get_args(annotation):
            yield from _choices(part)


def _sentences(docstring: str | None) -> str:
    return " ".join((docstring or "").split())


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
