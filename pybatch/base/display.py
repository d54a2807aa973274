"""How records show themselves in notebooks and in `print`; what makes the text is put in from above."""

from __future__ import annotations

from collections.abc import Callable

_html: Callable[[object], str] | None = None
_text: Callable[[object], str] | None = None


def show_with(html: Callable[[object], str], text: Callable[[object], str]) -> None:
    """Let these make the HTML and the text of every record. `pybatch` itself does, with two that import when called."""
    global _html, _text
    _html, _text = html, text


class Shown:
    """A record that `print` and notebooks (IPython's `_repr_html_` protocol) show as a report does; `repr` has every
    field."""

    def _repr_html_(self) -> str | None:
        """HTML without scripts, every text escaped; None, and so the plain text, where nothing renders it."""
        return _html(self) if _html is not None else None

    def __str__(self) -> str:
        text = _text(self) if _text is not None else ""
        return text or repr(self)  # an empty record has nothing to show
