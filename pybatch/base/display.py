"""How a record shows itself in a notebook, without knowing of reports: what renders it is put in from above."""

from __future__ import annotations

from collections.abc import Callable

_renderer: Callable[[object], str] | None = None


def render_with(renderer: Callable[[object], str]) -> None:
    """Let this function make the HTML of every record. `pybatch` itself does, with one that imports when called."""
    global _renderer
    _renderer = renderer


class Shown:
    """A record that notebooks show as HTML, by IPython's `_repr_html_` protocol."""

    def _repr_html_(self) -> str | None:
        """HTML without scripts, every text escaped; None, and so the plain text, where nothing renders it."""
        return _renderer(self) if _renderer is not None else None
