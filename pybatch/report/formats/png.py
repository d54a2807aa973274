"""Plots as PNG files, by kaleido: plotly's exporter, which has an installed Chrome or Chromium draw them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from pybatch.base.codec import encode
from pybatch.base.errors import UsageError
from pybatch.records import Run
from pybatch.report.plot import Plot, safe, themed
from pybatch.report.run import plots

WIDTH, HEIGHT, SCALE = 1000, 600, 2  # CSS pixels, and how many dots each has
_PATIENCE_S = 120
_BASE = {
    "paper_bgcolor": "#ffffff",
    "plot_bgcolor": "#ffffff",
    "font": {"color": "@ink", "family": "system-ui, sans-serif", "size": 13},
    "margin": {"l": 10, "r": 20, "t": 60, "b": 10},
}
_LEGEND = {"orientation": "h", "x": 0, "y": -0.26, "xanchor": "left", "yanchor": "top"}
_AXIS = {
    "gridcolor": "@grid",
    "linecolor": "@grid",
    "zerolinecolor": "@grid",
    "automargin": True,
    "exponentformat": "SI",
}


def write_pngs(runs: Sequence[Run], folder: str | Path) -> list[Path]:
    """Write every plot of the runs as FOLDER/<name>.png, 2000 x 1200 dots; returns the paths.

    Raises:
        UsageError: there is nothing to draw, or as `write_plots`.
    """
    drawn = [plot for number, run in enumerate(runs) for plot in plots(run, number) if plot.missing is None]
    if not drawn:
        raise UsageError("there is no figure to draw in these records. Give a run with capacity or a sweep.")
    return write_plots(drawn, folder)


def write_plots(drawn: Sequence[Plot], folder: str | Path) -> list[Path]:
    """Write these plots as FOLDER/<name>.png; returns the paths.

    Raises:
        UsageError: kaleido or a browser for it is not installed or fails, or the folder can't be written.
    """
    try:
        import kaleido  # noqa: F401 - asked before a folder is made
        from choreographer.browsers.chromium import Chromium
    except ImportError:
        raise UsageError("PNG files are drawn by kaleido, which is not installed. Run: pip install kaleido") from None
    if Chromium.find_browser(skip_local=False) is None:
        raise UsageError(
            "PNG files are drawn by Chrome or Chromium, and none was found. Install one (Debian: apt install chromium) "
            "or name its path in BROWSER_PATH; the HTML report has a button for PNG at every figure."
        )
    into = Path(folder)
    try:
        into.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pybatch-", dir=into) as place:
            made = [Path(place, f"{plot.name}.png") for plot in drawn]
            _draw(drawn, made)
            return [path.replace(into / path.name) for path in made]
    except OSError as error:
        raise UsageError(f"figures cannot be written to {str(folder)!r}: {error.strerror or error}.") from None


def _draw(drawn: Sequence[Plot], paths: Sequence[Path]) -> None:
    import kaleido

    size = {"format": "png", "width": WIDTH, "height": HEIGHT, "scale": SCALE}
    orders = [{"fig": _alone(plot), "path": path, "opts": size} for plot, path in zip(drawn, paths, strict=True)]
    try:
        # mathjax would be fetched from the network
        kaleido.write_fig_from_object_sync(orders, kopts={"timeout": _PATIENCE_S, "mathjax": False})
    except Exception as error:  # whatever a browser's driver raises
        raise UsageError(f"the browser drew no figures ({error}). Name another in BROWSER_PATH.") from None


def _alone(plot: Plot) -> dict[str, object]:
    """A plot with its title in it, on white."""
    axes = {key: _AXIS | value for key, value in plot.layout.items() if key.startswith(("xaxis", "yaxis"))}
    more = {"title": {"text": safe(plot.title), "x": 0.02}, "legend": _LEGEND | plot.layout.get("legend", {})}
    whole: dict[str, object] = encode({"data": plot.traces, "layout": _BASE | plot.layout | axes | more})
    return {key: themed(value, "light") for key, value in whole.items()}
