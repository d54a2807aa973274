"""The HTML report: what it says without JavaScript, what a browser draws, and that nothing gets out of its place."""

import base64
import dataclasses
import hashlib
import json
import re
import shutil

import pytest
from cases.pages import HOSTILE, curve, hostile, with_samples

from pybatch.answer.verdict import advise
from pybatch.base import numerals
from pybatch.base.errors import UsageError
from pybatch.records import (
    Convergence,
    ConvergencePoint,
    Curve,
    FrontierPoint,
    LayerNoise,
    NoisePoint,
    NoiseTrajectory,
    RateSteps,
    Training,
)
from pybatch.report import noise as noise_report
from pybatch.report import steps as steps_report
from pybatch.report import training as training_report
from pybatch.report import verdict as verdict_report
from pybatch.report.formats.html import page, write_report
from pybatch.report.plot import axis, batch_axis
from pybatch.report.run import plots


@pytest.fixture
def judged(run):
    return dataclasses.replace(run, verdict=advise(run.capacity, run.noise))


def device_plots(run):
    """Those of capacity, sweep and verdict, by the names they have before runs are told apart."""
    return [dataclasses.replace(p, name=p.name.removesuffix("-0")) for p in plots(run) if "noise" not in p.name]


def embedded(text):
    return json.loads(re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.S)[1])


def test_every_figure_is_valid_plotly_and_has_a_table(judged):
    import plotly.graph_objects as go

    figures = device_plots(judged)
    assert {f.name for f in figures} == {"throughput", "goodput", "step-time", "utilization", "roofs", "frontier"}
    for figure in figures:
        plain = json.loads(re.sub(r'"@[a-z]+(/\d+)?"', '"#123456"', json.dumps([figure.traces, figure.layout])))
        go.Figure(data=plain[0], layout=plain[1])  # refuses an unknown property
        assert figure.table.rows
        assert all(len(row) == len(figure.table.heads) for row in figure.table.rows)


def test_the_picture_shows_what_the_record_says(judged):
    throughput = device_plots(judged)[0]
    measured = next(t for t in throughput.traces if t["name"] == "measured")
    assert measured["x"] == [1, 8, 64, 512]
    assert measured["y"] == [p.samples_per_s for p in judged.capacity.batches if p.samples_per_s]
    lines = {t["name"].split()[0]: t["x"][0] for t in throughput.traces if t.get("hoverinfo") == "name"}
    assert lines == {"critical": 40.0, "saturation": 190.0, "best": judged.verdict.best_batch}
    goodput = device_plots(judged)[1]
    peak = next(t for t in goodput.traces if t["name"] == "goodput, of its peak")
    at = peak["x"][peak["y"].index(max(peak["y"]))]
    assert at == pytest.approx(judged.verdict.why("best_batch").inputs["optimum"], rel=0.05)


def test_samples_and_drift_are_drawn_from_quantiles(judged):
    import plotly.graph_objects as go

    [figure] = [f for f in device_plots(with_samples(judged)) if f.name == "samples"]
    plain = json.loads(re.sub(r'"@[a-z]+(/\d+)?"', '"#123456"', json.dumps([figure.traces, figure.layout])))
    go.Figure(data=plain[0], layout=plain[1])
    boxes, anchor = figure.traces
    assert boxes["x"] == ["1", "8", "64", "512"]
    for key, value in {"lowerfence": 0.92, "q1": 0.97, "median": 1.0, "q3": 1.1, "upperfence": 1.4}.items():
        assert boxes[key] == pytest.approx([value] * 4)
    assert anchor["x"] == ["8 at first", "8 at last"]
    assert anchor["median"] == pytest.approx([1.0, 1.1])
    assert len(figure.table.rows) == 6
    assert figure.table.rows[0][:3] == ("1", "25", "1.89")
    assert not [f for f in device_plots(judged) if f.name == "samples"]  # none were kept


def test_goodput_peaks_where_the_fitted_curve_says(run):
    from cases.verdicts import MODELS, swept_by

    steps = swept_by(MODELS["power"])
    judged = dataclasses.replace(run, convergence=steps, verdict=advise(run.capacity, run.noise, steps))
    goodput = device_plots(judged)[1]
    peak = next(t for t in goodput.traces if t["name"] == "goodput, of its peak")
    at = peak["x"][peak["y"].index(max(peak["y"]))]
    assert at == pytest.approx(judged.verdict.why("best_batch").inputs["optimum"], rel=0.05)
    assert max(max(t["y"]) for t in goodput.traces if t["name"].startswith("progress")) == pytest.approx(1.0)
    assert "by measured steps" in goodput.caption


def test_seeds_that_a_race_left_out_are_no_failures():
    raced = RateSteps(0.1, (40.0, None, None), ("reached", "not_run", "not_run"))
    none = RateSteps(0.2, (None, None, None), ("not_run", "not_run", "not_run"))
    point = ConvergencePoint(8, 40.0, "reached", 3, 0.1, reached=1, rates=(raced, none))
    heat = steps_report.plots(Convergence((Curve("tuned", "train", (point,), None, None, None, None, 0.1),)))[2]
    assert heat.traces[0]["text"] == [["40 (1 of 3 seeds)"], ["not tried"]]


def test_convergence_is_drawn_with_its_fit_and_its_failures():
    import plotly.graph_objects as go

    figures = steps_report.plots(Convergence((curve(),)), "images")
    assert [f.name for f in figures] == ["steps-0", "examples-0", "rates-0-0"]
    for figure in figures:
        plain = json.loads(re.sub(r'"@[a-z]+(/\d+)?"', '"#123456"', json.dumps([figure.traces, figure.layout])))
        go.Figure(data=plain[0], layout=plain[1])
    steps, examples, rates = figures
    by_name = {trace["name"]: trace for trace in steps.traces}
    assert by_name["tuned"]["y"] == [50 * (1 + 40 / b) for b in (8, 16, 32, 64, 128)]
    assert by_name["tuned"]["error_y"]["array"] == pytest.approx([1.0] * 5)
    assert by_name["tuned: diverged"]["x"] == [256]
    drawn = next(trace for name, trace in by_name.items() if name.startswith("fit: tuned"))
    wanted = [50 * (1 + 40 / x) for x in drawn["x"]]
    assert drawn["y"] == pytest.approx(wanted, rel=1e-3)
    cost = next(t for t in examples.traces if t["name"] == "tuned")
    assert cost["y"] == pytest.approx([(b + 40) / 48 for b in (8, 16, 32, 64, 128)])
    heat = rates.traces[0]
    assert heat["text"][0][0] == "not reached"
    assert heat["text"][2][0] == "diverged"
    assert [10**z for z in heat["z"][1][:5]] == pytest.approx(by_name["tuned"]["y"])
    assert heat["z"][0][0] is None


def test_a_target_that_nothing_reached_is_said():
    never = ConvergencePoint(8, None, "not_reached", 2, 0.1)
    figures = steps_report.plots(Convergence((Curve("sqrt", "test", (never,), None, None, None, None),)))
    assert all(f.missing for f in figures)


def test_a_sweep_of_two_thousand_trials_is_small(judged):
    one = curve()
    curves = tuple(
        dataclasses.replace(one, rule=rule, split=split)
        for rule in ("tuned", "sqrt", "linear", "constant")
        for split in ("train", "test")
    )
    text = page([dataclasses.replace(judged, convergence=Convergence(curves))])
    assert len(text.encode()) < 8e6


def test_ticks_are_powers_of_two_and_few():
    for low, high in ((1, 4096), (1, 2**20), (3, 5), (1, 1)):
        axis = batch_axis(low, high, "x")
        assert 1 <= len(axis["tickvals"]) <= 9
        assert all(value & (value - 1) == 0 for value in axis["tickvals"])
    assert batch_axis(1, 4096, "x")["ticktext"][-1] == "4k"


def test_text_stands_without_scripts(judged):
    text = re.sub(r"<script.*?</script>", "", page([judged]), flags=re.S)
    large, _, reasons = judged.verdict.answer.partition(" (")
    words = (large, reasons.removesuffix(").").partition(";")[0], judged.verdict.because)
    for expected in (*words, "Provenance", "pybatch bench", "Table", "How each figure came about"):
        assert expected in text
    for point in judged.capacity.batches:
        assert f"{point.batch:,}" in text


def test_hostile_names_stay_text(judged):
    text = page([hostile(judged)])
    assert HOSTILE not in text
    body = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert "<img" not in body
    assert 'href="http' not in body
    labels = json.dumps(embedded(text))
    assert "<img" not in labels
    assert "<a " not in labels


def test_the_page_forbids_itself_everything_but_its_own_scripts(judged):
    text = page([judged])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    allowed = {base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in scripts}
    assert set(re.findall(r"sha256-([^']*)", policy)) == allowed
    assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="(?!data:)', text)


def test_a_run_without_capacity_has_a_page(judged):
    bare = dataclasses.replace(judged.noise, layers=())
    text = page([dataclasses.replace(judged, capacity=None, verdict=None, noise=bare)])
    assert "Gradient noise scale" in text
    assert "plotly" not in text.lower()


def test_several_runs_have_distinct_plots(judged):
    text = page([judged, judged])
    names = [figure["name"] for figure in embedded(text)]
    assert len(names) == len(set(names)) == 14
    assert text.count('class="plot"') == 14
    assert '<a href="#run-1">' in text


def test_loose_results_are_one_run(judged, tmp_path):
    write_report([judged.capacity, judged.noise, judged.verdict], tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert judged.verdict.because in text
    assert "Provenance" not in text


@pytest.mark.parametrize(("records", "cause"), [([], "no records"), ([3], "int 3"), ("ab", "str")])
def test_what_is_no_record_is_refused(records, cause, tmp_path):
    with pytest.raises(UsageError, match=cause):
        write_report(records, tmp_path / "a.html")
    assert list(tmp_path.iterdir()) == []


def test_two_loose_results_of_a_kind_are_refused(judged, tmp_path):
    with pytest.raises(UsageError, match="second NoiseScale"):
        write_report([judged.noise, judged.noise], tmp_path / "a.html")


@pytest.fixture(scope="module")
def browser():
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def visit(browser, path, width, scheme="light"):
    """Open a page; returns (errors in the console, requests other than the page's own)."""
    from selenium.webdriver.support.ui import WebDriverWait

    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(path.as_uri())
    WebDriverWait(browser, 30).until(lambda b: b.execute_script("return document.documentElement.dataset.drawn"))
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return browser.get_log("browser"), [u for u in urls if not u.startswith(("data:", "blob:", path.as_uri()))]


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1200, "light")])
def test_in_a_browser(browser, judged, tmp_path, width, scheme):
    path = tmp_path / "report.html"
    write_report([hostile(judged), with_samples(judged)], path)
    errors, requests = visit(browser, path, width, scheme)
    assert errors == []
    assert requests == []
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('.trace').length)"
    )
    assert len(drawn) == 15
    assert min(drawn) > 0
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.title.startswith("pybatch")
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


def test_names_in_axes_are_text():
    assert batch_axis(1, 8, "<b>")["title"]["text"] == "&lt;b&gt;"


def test_a_trajectory_and_layers_are_drawn(judged):
    import plotly.graph_objects as go

    stretches = tuple(
        NoisePoint(
            16 * i, 16 * i + 15, 10.0 * 2**i, 9.0 * 2**i, 11.0 * 2**i, 1.0, 10.0, "resolved", 16, loss=2.0 / (i + 1)
        )
        for i in range(5)
    )
    lost = NoisePoint(80, 95, None, 40.0, None, 0.1, 10.0, "lower_bound", 16)
    layers = (LayerNoise("a<b>", 12.0, 0.1, 1.2, 10.0, 15.0, "resolved", 16), LayerNoise("c", None, 0.0, 1.0))
    noise = dataclasses.replace(judged.noise, layers=layers)
    trajectory = NoiseTrajectory((*stretches, lost), "ddp", "tokens")
    along, by_layer = noise_report.plots(noise, trajectory, "images")
    for figure in (along, by_layer):
        plain = json.loads(re.sub(r'"@[a-z]+(/\d+)?"', '"#123456"', json.dumps([figure.traces, figure.layout])))
        go.Figure(data=plain[0], layout=plain[1])
    drawn = next(trace for trace in along.traces if trace["name"] == "B_simple")
    assert drawn["y"] == [10.0 * 2**i for i in range(5)]
    assert drawn["x"][0] == 7.5
    assert along.layout["yaxis"]["title"]["text"] == "noise scale (tokens)"
    assert len(along.table.rows) == 6  # the table has what could not be drawn
    assert by_layer.traces[0]["y"] == ["a&lt;b&gt;"]
    assert by_layer.traces[0]["error_x"]["array"] == [3.0]
    unresolved = NoiseTrajectory((lost,), "ddp")
    assert noise_report.plots(None, unresolved, "images")[0].missing


def test_of_many_layers_the_largest_are_drawn_and_the_caption_says_so(judged):
    layers = tuple(LayerNoise(f"l{i}", 1.0 + i, 0.1, 1.2, 1.0, 150.0, "resolved", 16) for i in range(100))
    [figure] = noise_report.plots(dataclasses.replace(judged.noise, layers=layers), None, "images")
    assert figure.traces[0]["y"] == [f"l{i}" for i in range(40, 100)]
    assert "60 largest of 100" in figure.caption
    assert len(figure.table.rows) == 100
    [few] = noise_report.plots(dataclasses.replace(judged.noise, layers=layers[:60]), None, "images")
    assert "largest" not in few.caption


def test_rates_alike_in_three_digits_have_names_of_their_own():
    assert numerals.distinct([0.1, 0.01]) == ["0.100", "0.0100"]
    assert numerals.distinct([0.10001, 0.10002]) == ["0.10001", "0.10002"]


def test_reach_rates_count_the_runs_they_are_of():
    """No rate is chosen where none has half of its seeds reach: all runs of all rates are counted then."""
    rates = tuple(RateSteps(lr, (40.0, None, None), ("reached", "diverged", "diverged")) for lr in (0.1, 0.2, 0.4, 0.8))
    point = ConvergencePoint(8, None, "diverged", 3, None, reached=4, diverged=8, rates=rates)
    [steps, *_] = steps_report.plots(Convergence((Curve("tuned", "train", (point,), None, None, None, None, 0.1),)))
    assert dict(zip(steps.table.heads, steps.table.rows[0], strict=True))["runs"] == "4 of 12"


def test_a_logarithmic_axis_is_labelled_with_whole_numbers():
    """Plotly's own labels between powers of ten are single digits."""
    for values, dtick, form in (
        ((45, 1150), "D2", "~s"),
        ((0.3, 4), "D2", ".3~g"),
        ((2, 90_000), 1, "~s"),
        ((1.0, 3.0), None, None),
    ):
        made = axis("x", log=True, values=values)
        assert (made.get("dtick"), made.get("tickformat")) == (dtick, form)
    assert axis("x", log=True, values=(1, 50), tickformat=".2f")["tickformat"] == ".2f"


def test_every_logarithmic_axis_knows_all_that_is_drawn(judged):
    """Bounds too: figures of 20 to 60 whose intervals reach from 2 to 600 are labelled at powers of ten."""
    trajectory = tuple(
        NoisePoint(first, first + 99, b, b / 10, b * 10, 1.0, b, "resolved", 10)
        for first, b in ((1, 20.0), (101, 40.0), (201, 60.0))
    )
    layers = (LayerNoise("a", 20.0, 1.0, 20.0, 2.0, 600.0, "resolved"), LayerNoise("b", 60.0, 1.0, 60.0))
    noise = dataclasses.replace(judged.noise, trajectory=trajectory, layers=layers)
    found = {plot.name: plot.layout for plot in plots(dataclasses.replace(judged, noise=noise))}
    assert found["noise-along-0"]["yaxis"]["dtick"] == found["noise-layers-0"]["xaxis"]["dtick"] == 1
    wide = (FrontierPoint(1, 8, 1.0, 1.0), FrontierPoint(64, 256, 0.05, 3.2))
    layout = verdict_report.frontier(dataclasses.replace(judged.verdict, frontier=wide)).layout
    assert (layout["yaxis"]["dtick"], layout["yaxis"]["tickformat"]) == ("D2", ".3~g")


def test_captions_speak_of_what_is_drawn(judged):
    throughput = device_plots(judged)[0]
    assert "Right of the saturation batch" in throughput.caption
    bare = dataclasses.replace(judged.capacity, saturation_batch=None, saturation_low=None, saturation_high=None)
    [alone] = [p for p in plots(dataclasses.replace(judged, capacity=bare, verdict=None)) if "throughput" in p.name]
    assert "saturation" not in alone.caption
    assert "critical" not in alone.caption
    assert "Shaded" not in alone.caption
    utilization = next(p for p in device_plots(judged) if p.name == "utilization")
    assert "Not read on this device" not in utilization.caption  # a CPU has no such counters
    gpu = dataclasses.replace(judged.capacity.device, kind="cuda")
    on_gpu = dataclasses.replace(judged, capacity=dataclasses.replace(judged.capacity, device=gpu))
    assert "SM active" in next(p for p in device_plots(on_gpu) if p.name == "utilization").caption


def test_the_parts_of_a_step_are_told_in_the_bar_in_their_order():
    import plotly.graph_objects as go

    watched = Training("t", "M", "SGD", step_ms=20.0, waiting=0.5, forward=0.2, backward=0.2, update=0.1)
    [plot] = training_report.plots(watched)
    assert [trace["name"] for trace in plot.traces] == ["waiting for data", "forward and loss", "backward", "update"]
    assert plot.layout["legend"]["traceorder"] == "normal"
    assert plot.layout["xaxis"]["range"] == [-0.01, 1.03]
    assert all(trace["texttemplate"] == "%{x:.0%}" for trace in plot.traces)
    assert ", 20 ms," in plot.caption
    plain = json.loads(re.sub(r'"@[a-z]+(/\d+)?"', '"#123456"', json.dumps([plot.traces, plot.layout])))
    go.Figure(data=plain[0], layout=plain[1])  # refuses an unknown property
