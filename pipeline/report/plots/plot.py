"""`Plot`: an SVG drawing, its caption, and the section of the page that shows it.

Axes: none.
"""

from dataclasses import dataclass
from enum import StrEnum


class PageSection(StrEnum):
    """The section of the page that shows a plot."""

    KERNEL = "kernel"
    SPECTRUM = "spectrum"
    REGRESSION = "regression"
    FURTHER = "further"


@dataclass(frozen=True)
class Plot:
    """A plot on the page.

    Attributes:
        section: the section of the page that shows it.
        svg: an `<svg>` element; the page includes it unchanged.
        caption: a sentence below it.

    Example:
        >>> Plot(PageSection.FURTHER, "<svg></svg>", "Nothing.").section
        <PageSection.FURTHER: 'further'>
    """

    section: PageSection
    svg: str
    caption: str
