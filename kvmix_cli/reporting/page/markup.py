"""Markup of our own for the page's template, which escapes everything else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .look import Look, swatch

if TYPE_CHECKING:
    from markupsafe import Markup


def raw(markup: str) -> Markup:
    """Markup in which whatever came from files is escaped already."""
    from markupsafe import Markup

    return Markup(markup)


def point(look: Look) -> Markup:
    """A plan's point, to stand beside its name."""
    return raw(swatch(look))
