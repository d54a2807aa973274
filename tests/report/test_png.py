"""Figures as PNG files, by whatever Chrome or Chromium is there; without one, the remedy."""

import dataclasses
import shutil

import pytest
from cases.pages import hostile, with_samples
from PIL import Image

from pybatch.base.errors import UsageError
from pybatch.report.formats import png
from pybatch.report.formats.png import HEIGHT, SCALE, WIDTH, write_pngs
from pybatch.report.run import plots


@pytest.mark.skipif(not any(map(shutil.which, png.BROWSERS)), reason="no Chrome or Chromium is installed")
def test_every_figure_becomes_a_picture(run, tmp_path):
    runs = [hostile(with_samples(run)), run]
    paths = write_pngs(runs, tmp_path / "new" / "figures")
    wanted = [f.name for number, each in enumerate(runs) for f in plots(each, number) if f.missing is None]
    assert [path.stem for path in paths] == wanted
    for path in paths:
        with Image.open(path) as image:
            assert image.size == (WIDTH * SCALE, HEIGHT * SCALE)
            colors = image.convert("RGB").getcolors(maxcolors=2**24)
        paper = max(colors)
        assert paper[1] == (255, 255, 255)
        assert len(colors) > 20  # text and lines, not an empty page


def test_without_a_browser_the_remedy_is_said(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(png.VARIABLE, raising=False)
    with pytest.raises(UsageError, match=r"none was found\. Install one .*apt install chromium"):
        write_pngs([run], tmp_path / "figures")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(png.VARIABLE, "/nowhere/chrome")
    with pytest.raises(UsageError, match="PYBATCH_BROWSER=/nowhere/chrome is not there"):
        write_pngs([run], tmp_path / "figures")


def test_a_browser_that_fails_is_named(run, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'no display' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv(png.VARIABLE, str(broken))
    with pytest.raises(UsageError, match=r"broken drew 0 of 6 figures \(status 3; it says: no display\)"):
        write_pngs([run], tmp_path / "figures")


def test_nothing_to_draw_and_nowhere_to_write(run, tmp_path):
    bare = dataclasses.replace(run, capacity=None, noise=None, verdict=None)
    with pytest.raises(UsageError, match="no figure to draw"):
        write_pngs([bare], tmp_path / "figures")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        write_pngs([run], tmp_path / "file" / "figures")
