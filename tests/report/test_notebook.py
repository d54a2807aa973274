"""Records in a notebook: HTML of their own, every foreign text escaped, and nothing that reaches outside."""

import dataclasses
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from cases.pages import HOSTILE, curve, hostile

from pybatch.base import display
from pybatch.base.errors import UsageError
from pybatch.records import Convergence, NoisePoint, NoiseTrajectory
from pybatch.report.formats.notebook import render


class Tags(HTMLParser):
    """Every tag, and whether each that opens closes."""

    def __init__(self, text):
        super().__init__()
        self.seen, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def shown(run):
    steps = Convergence((curve(HOSTILE),), workload=run.capacity.workload)
    stretch = NoisePoint(0, 15, 10.0, 9.0, 11.0, 1.0, 10.0, "resolved", 16)
    return {
        "Run": (run, "8.40"),
        "Verdict": (run.verdict, "Use batch 32."),
        "Capacity": (run.capacity, "predicted oom"),
        "NoiseScale": (run.noise, "[31 to 52]"),
        "Convergence": (steps, "critical batch"),
        "NoiseTrajectory": (NoiseTrajectory((stretch,), "ddp"), "0 to 15"),
        "StepsFit": (steps.curves[0].fit, "hyperbola"),
        "ThroughputFit": (run.capacity.model, "half batch"),
    }


KINDS = ("Run", "Verdict", "Capacity", "NoiseScale", "Convergence", "NoiseTrajectory", "StepsFit", "ThroughputFit")
TAGS = {
    "div",
    "style",
    "h1",
    "h2",
    "h3",
    "p",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "ul",
    "li",
    "span",
    "strong",
}
TAGS |= {"details", "summary"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_shows_itself(run, kind):
    record, says = shown(hostile(run))[kind]
    assert type(record).__name__ == kind
    text = record._repr_html_()
    assert says in text
    assert HOSTILE not in text
    tags = Tags(text)
    assert tags.open == []
    assert set(tags.seen) <= TAGS
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    chosen = [one.strip() for rule in re.findall(r"([^{}]+)\{", style) for one in rule.split(",")]
    assert all(one.startswith(".pybatch") for one in chosen)
    assert "url(" not in style


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_prints_as_a_report_has_it(run, kind):
    """print() of a fit or a run was its repr, of up to twenty thousand characters."""
    record, says = shown(run)[kind]
    text = str(record)
    assert says in text
    assert not text.startswith(f"{kind}(")
    if kind not in ("Verdict", "Convergence"):  # a paragraph, and a rule with a long name
        assert max(map(len, text.splitlines())) <= 80


def test_what_is_no_record_has_no_html():
    with pytest.raises(UsageError, match="int 3"):
        render(3)


def test_without_a_renderer_the_plain_text_stands(run, monkeypatch):
    display_with = {"_html": None, "_text": None}
    for name, value in display_with.items():
        monkeypatch.setattr(display, name, value)
    assert run._repr_html_() is None
    assert str(run) == repr(run)


def test_the_import_of_pybatch_stays_light_and_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; import pybatch\n"
        "known = ('pybatch.base', 'pybatch.base.display')\n"
        "assert not [m for m in sys.modules if m.startswith(('pybatch.', 'numpy')) and m not in known]\n"
        "from pybatch.records import Verdict\n"
        "v = Verdict(*[None] * 8, 'unresolved', None, None, 'No <b>batch</b>.')\n"
        "assert 'No &lt;b&gt;batch&lt;/b&gt;.' in v._repr_html_()\n"
        "assert str(v) == 'No <b>batch</b>.'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_ipython_takes_it(run):
    formatters = pytest.importorskip("IPython.core.formatters")
    made, _ = formatters.DisplayFormatter().format(dataclasses.replace(run, verdict=None))
    assert made["text/html"].startswith('<div class="pybatch">')
