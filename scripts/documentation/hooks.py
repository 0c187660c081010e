"""Hooks of MkDocs: pages that live outside docs/, the configuration reference, and formulas as MathML.

MkDocs calls the functions below by their names (see `hooks` in mkdocs.yml).
"""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from scripts.documentation.configuration import configuration_reference
from scripts.documentation.public_names import public_names

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
REFERENCE = "<!-- configuration reference -->"
_PUBLIC_NAMES = re.compile(r"<!-- public names of ([\w.]+) -->")

_FORMULA = re.compile(r'(<(?:span|div) class="arithmatex">)\\([(\[])(.*?)\\[)\]](</(?:span|div)>)', re.DOTALL)
_LINK_INTO_DOCS = re.compile(r"\]\(docs/")
_LINK_OUT = re.compile(r"\[([^\]]+)\]\((?!https?:|#)[^)]*\)")


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the pages that live in the root of the repository."""
    for name, source in OUTSIDE.items():
        files.append(File.generated(config, name, content=_moved(Path(ROOT / source).read_text())))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Put the configuration reference and lists of public names into their places."""
    if REFERENCE in markdown:
        markdown = markdown.replace(REFERENCE, configuration_reference())
    return _PUBLIC_NAMES.sub(lambda match: public_names(match.group(1)), markdown)


def on_page_content(content: str, page: Page, **_: Any) -> str:
    """Turn formulas into MathML, which browsers show without a script."""

    def mathml(match: re.Match[str]) -> str:
        opening, kind, formula, closing = match.groups()
        try:
            markup = convert(html.unescape(formula), display="block" if kind == "[" else "inline")
        except Exception as error:
            raise PluginError(f"{page.file.src_uri}: the formula {formula!r} cannot be read: {error!r}") from error
        return f"{opening}{markup}{closing}"

    return _FORMULA.sub(mathml, content)


def _moved(text: str) -> str:
    """A page of the root as a page of the site: links into docs/ stay links, others to files become plain names."""
    text = _LINK_INTO_DOCS.sub("](", text)
    pages = {source: name for name, source in OUTSIDE.items()}

    def link(match: re.Match[str]) -> str:
        target = match.group(0).rpartition("(")[2].rstrip(")")
        if target in pages:
            return f"[{match.group(1)}]({pages[target]})"
        return match.group(0) if target.partition("#")[0].endswith(".md") and "/" not in target else match.group(1)

    return _LINK_OUT.sub(link, text)
