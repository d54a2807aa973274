"""Figures as PNG files, by whatever Chrome or Chromium is there; without one, the remedy."""

import dataclasses
import sys

import pytest
from cases.pages import hostile, with_samples
from PIL import Image

from pybatch.base.errors import UsageError
from pybatch.records import Run
from pybatch.report.formats.png import HEIGHT, SCALE, WIDTH, write_pngs
from pybatch.report.run import plots

FIND = "choreographer.browsers.chromium.Chromium.find_browser"


@pytest.fixture
def needs_browser():
    from choreographer.browsers.chromium import Chromium

    if Chromium.find_browser(skip_local=False) is None:
        pytest.skip("no Chrome or Chromium is installed")


@pytest.mark.usefixtures("needs_browser")
def test_every_figure_becomes_a_picture(run, tmp_path):
    runs = [hostile(with_samples(run)), Run("", None, noise=run.noise)]
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
        if path.stem == "throughput-0":
            assert (0x00, 0x72, 0xB2) in {color for _, color in colors}  # blue, as the page has it in a light theme


def test_without_a_browser_the_remedy_is_said(run, tmp_path, monkeypatch):
    monkeypatch.setattr(FIND, lambda **options: None)
    with pytest.raises(UsageError, match=r"none was found\. Install one .*apt install chromium.*BROWSER_PATH"):
        write_pngs([run], tmp_path / "figures")
    assert list(tmp_path.iterdir()) == []


def test_without_kaleido_the_remedy_is_said(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(UsageError, match="pip install kaleido"):
        write_pngs([run], tmp_path / "figures")
    assert list(tmp_path.iterdir()) == []


def test_a_browser_that_fails_is_told(run, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'no display' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("BROWSER_PATH", str(broken))
    with pytest.raises(UsageError, match=r"the browser drew no figures \(.*BROWSER_PATH"):
        write_pngs([run], tmp_path / "figures")
    assert list((tmp_path / "figures").iterdir()) == []


def test_nothing_to_draw_and_nowhere_to_write(run, tmp_path, monkeypatch):
    monkeypatch.setattr(FIND, lambda **options: "chromium")
    bare = dataclasses.replace(run, capacity=None, noise=None, verdict=None)
    with pytest.raises(UsageError, match="no figure to draw"):
        write_pngs([bare], tmp_path / "figures")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        write_pngs([run], tmp_path / "file" / "figures")
