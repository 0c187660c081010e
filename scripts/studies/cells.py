"""Cells, the parts of a study: computed one by one and kept, so that an interrupted run loses at most one cell.

A cell is a question with all its settings, seeds included, and a function that answers it in plain numbers. An answer
is kept under the cell's key together with the settings that it belongs to, and is computed again only when these
differ. Nothing is measured or rendered here.

Axes: none.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from nntk_dist.runtime.threads import torch_threads
from pipeline.driver.progress import Progress
from pipeline.records.manifest import environment_versions, git_commit

Answer = dict[str, Any]
_SHOWN = ("python", "torch", "numpy", "scipy")


@dataclass(frozen=True)
class Cell:
    """One question: `settings` say all that its answer depends on, `compute` answers it in values that JSON knows."""

    key: str
    settings: Mapping[str, Any]
    compute: Callable[[], Answer]


class Answers:
    """The answers so far, by section and key, as kept in a JSON file; every new answer is written immediately.

    `versions` are the versions of Python and of the packages behind the last answer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        kept = json.loads(path.read_text()) if path.exists() else {}
        self.versions: dict[str, str | None] = kept.get("versions", {})
        self.sections: dict[str, dict[str, Answer]] = kept.get("sections", {})

    def has(self, section: str, cell: Cell) -> bool:
        """Whether the cell was answered with these settings."""
        kept = self.sections.get(section, {}).get(cell.key)
        return kept is not None and kept["settings"] == _plain(cell.settings)

    def keep(self, section: str, cell: Cell) -> None:
        """Compute a cell and write its answer down, with the time that it took and the code that it is of."""
        began = time.perf_counter()
        answer = cell.compute()
        self.versions = {name: version for name, version in environment_versions().items() if name in _SHOWN}
        self.sections.setdefault(section, {})[cell.key] = _plain(
            {
                "settings": cell.settings,
                "answer": answer,
                "seconds": round(time.perf_counter() - began, 1),
                "commit": git_commit(Path(__file__), but_for="docs"),  # the folder of the answers themselves
                "machine": machine(),
            }
        )
        self.write()

    def order(self, section: str, cells: Iterable[Cell]) -> None:
        """Keep only these cells of a section, in this order."""
        kept = self.sections.get(section, {})
        self.sections[section] = {cell.key: kept[cell.key] for cell in cells if cell.key in kept}
        self.write()

    def write(self) -> None:
        """Replace the file, atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"written": datetime.now(UTC).isoformat(timespec="seconds"), "versions": self.versions}
        text = json.dumps(content | {"sections": self.sections}, indent=1, ensure_ascii=False)
        partial = self.path.with_suffix(".partial")
        partial.write_text(text + "\n")
        os.replace(partial, self.path)


def answer_all(
    answers: Answers, section: str, cells: list[Cell], progress: Progress, *, threads: int | None = 1
) -> None:
    """Answer what is not answered yet, in order; with `threads` None the cells see to their threads themselves."""
    todo = [cell for cell in cells if not answers.has(section, cell)]
    with progress.stage(section, len(cells), len(cells) - len(todo)) as stage, torch_threads(threads):
        for cell in todo:
            answers.keep(section, cell)
            stage.advance()
    answers.order(section, cells)


def machine() -> str:
    """The kind of machine, in words."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{gpu}"


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))
