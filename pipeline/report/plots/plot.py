"""What a plot is: an SVG drawing, its caption, and the section of the page that shows it.

Axes: none.
"""

from dataclasses import dataclass
from enum import StrEnum


class PageSection(StrEnum):
    """The section of the page in which a plot stands."""

    KERNEL = "kernel"
    SPECTRUM = "spectrum"
    REGRESSION = "regression"
    FURTHER = "further"


@dataclass(frozen=True)
class Plot:
    """A plot on the page.

    Attributes:
        section: where it stands.
        svg: an `<svg>` element; it is inserted as it is.
        caption: a sentence below it.

    Example:
        >>> Plot(PageSection.FURTHER, "<svg></svg>", "Nothing.").section
        <PageSection.FURTHER: 'further'>
    """

    section: PageSection
    svg: str
    caption: str
