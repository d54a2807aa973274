"""Figures as PNG files, drawn by an installed Chrome or Chromium: the page's own script, without a network."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pybatch.base.errors import UsageError
from pybatch.records import Run
from pybatch.report.formats.html import as_data, embedded, plotly, resource
from pybatch.report.plot import Plot, safe
from pybatch.report.run import plots

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
VARIABLE = "PYBATCH_BROWSER"
WIDTH, HEIGHT, SCALE = 1000, 600, 2  # CSS pixels, and how many dots each has
_PATIENCE_S = 120
_SHOOT = """
"use strict";
const seen = new MutationObserver(async () => {
  if (!document.documentElement.dataset.drawn) return;
  seen.disconnect();
  for (const plot of document.querySelectorAll(".plot")) {
    const url = await Plotly.toImage(plot, { format: "png", width: WIDTH, height: HEIGHT, scale: SCALE });
    const held = document.createElement("output");
    held.dataset.name = plot.id;
    held.textContent = url;
    document.body.append(held);
  }
});
seen.observe(document.documentElement, { attributes: true });
"""
_IMAGE = re.compile(r'<output data-name="([^"]*)">data:image/png;base64,([^<]*)</output>')


def write_pngs(runs: Sequence[Run], folder: str | Path) -> list[Path]:
    """Write every figure of the runs as FOLDER/<name>.png, 2000 x 1200 dots; returns the paths.

    Raises:
        UsageError: no browser is installed or it fails, there is nothing to draw, or the folder can't be written.
    """
    figures = [f for number, run in enumerate(runs) for f in plots(run, number) if f.missing is None]
    if not figures:
        raise UsageError("there is no figure to draw in these records. Give a run with capacity or a sweep.")
    browser = _browser()
    into = Path(folder)
    try:
        into.mkdir(parents=True, exist_ok=True)
        images = _drawn(browser, figures)
        paths = [into / f"{name}.png" for name in images]
        for path, image in zip(paths, images.values(), strict=True):
            path.write_bytes(image)
    except OSError as error:
        raise UsageError(f"figures cannot be written to {str(folder)!r}: {error.strerror or error}.") from None
    return paths


def _browser() -> str:
    named = os.environ.get(VARIABLE)
    found = shutil.which(named) if named else next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        what = f"{VARIABLE}={named} is not there" if named else "none was found"
        raise UsageError(
            f"PNG files are drawn by Chrome or Chromium, and {what}. Install one (Debian: apt install chromium) or "
            f"name its path in {VARIABLE}; the HTML report has a button for PNG at every figure."
        )
    return found


def _drawn(browser: str, figures: Sequence[Plot]) -> Mapping[str, bytes]:
    with tempfile.TemporaryDirectory(prefix="pybatch-") as place:
        page = Path(place) / "figures.html"
        page.write_text(_page(figures), encoding="utf-8")
        flags = ["--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
        flags += [f"--user-data-dir={place}/profile", f"--window-size={WIDTH},{HEIGHT}"]
        flags += ["--virtual-time-budget=100000", "--dump-dom"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:  # Chrome refuses root a sandbox; the page is our own
            flags.append("--no-sandbox")
        try:
            done = subprocess.run(
                [browser, *flags, page.as_uri()],
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=_PATIENCE_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UsageError(f"{browser} drew nothing in {_PATIENCE_S} s. Name another in {VARIABLE}.") from None
    images = {name: base64.b64decode(data) for name, data in _IMAGE.findall(done.stdout)}
    if len(images) < len(figures):
        said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
        raise UsageError(
            f"{browser} drew {len(images)} of {len(figures)} figures (status {done.returncode}; it says: {said[0]}). "
            f"Name another in {VARIABLE}."
        )
    return images


def _page(figures: Sequence[Plot]) -> str:
    """Plots alone, each with its title in it, on white."""
    alone = {"paper_bgcolor": "#ffffff", "margin": {"l": 10, "r": 20, "t": 60, "b": 10}}
    titled = [replace(f, layout=f.layout | alone | {"title": {"text": safe(f.title), "x": 0.02}}) for f in figures]
    plots = "".join(f'<div class="plot" id="{safe(figure.name)}"></div>' for figure in figures)
    shoot = _SHOOT.replace("WIDTH", str(WIDTH)).replace("HEIGHT", str(HEIGHT)).replace("SCALE", str(SCALE))
    return (
        '<!doctype html>\n<html><head><meta charset="utf-8">'
        f"<style>.plot {{ width: {WIDTH}px; height: {HEIGHT}px }}</style></head><body>{plots}\n"
        f'<script type="application/json" id="figures">{embedded(list(map(as_data, titled)))}</script>\n'
        f"<script>{plotly()}</script>\n<script>{shoot}</script>\n<script>{resource('page.js')}</script>\n"
        "</body></html>\n"
    )
