"""The repeatability benchmark: what it calls agreement, on records whose figures are known."""

import dataclasses
import json
import sys

import pytest
import repeatability


def moved(run, ceiling=None, step=1.0):
    """The same run with another ceiling, and step times that are this many times as long."""
    points = tuple(
        dataclasses.replace(p, **{k: getattr(p, k) * step for k in ("step_ms", "step_ms_low", "step_ms_high")})
        if p.step_ms
        else p
        for p in run.capacity.batches
    )
    model = dataclasses.replace(run.capacity.model, ceiling=ceiling or run.capacity.model.ceiling)
    return dataclasses.replace(run, capacity=dataclasses.replace(run.capacity, model=model, batches=points))


def test_equal_runs_agree(run):
    found = repeatability.compare([run, run])
    assert all(figure["agree"] and figure["spread"] == 0 for figure in found["figures"].values())
    assert found["step_ms"]["inside"] == found["step_ms"]["pairs"] == 8


@pytest.mark.parametrize(("ceiling", "inside"), [(10_299.0, 2), (10_301.0, 1), (9_000.0, 1)])
def test_a_value_outside_the_others_interval_is_a_disagreement(run, ceiling, inside):
    figure = repeatability.compare([run, moved(run, ceiling)])["figures"]["ceiling"]
    assert (figure["inside"], figure["pairs"], figure["agree"]) == (inside, 2, inside == 2)
    assert figure["spread"] == pytest.approx(max(ceiling, 1e4) / min(ceiling, 1e4) - 1)


def test_step_times_are_compared_batch_by_batch(run):
    found = repeatability.compare([run, moved(run, step=1.015)])["step_ms"]
    # 1.5 % up is inside the first run's interval of -1 % to +2 %; 1.5 % down is outside the second's.
    assert (found["inside"], found["pairs"]) == (4, 8)
    assert [point["batch"] for point in found["points"]] == [1, 8, 64, 512]


def test_an_open_end_holds_everything_and_a_missing_fit_agrees_with_nothing(run):
    assert repeatability.agreement([[5.0, 1.0, None], [900.0, None, None]])["inside"] == 2
    without = dataclasses.replace(run, capacity=dataclasses.replace(run.capacity, model=None))
    assert not repeatability.compare([run, without])["figures"]["ceiling"]["agree"]


def test_the_whole_script_on_records_that_a_stand_in_measures(run, monkeypatch, tmp_path, capsys):
    runs = iter([run, moved(run, 20_000.0)])
    entry = {"seconds": 61.0, "status": 0, "load_before": 0.1, "load_after": 1.0}
    monkeypatch.setattr(repeatability, "measure", lambda flags, limit: entry | {"run": next(runs)})
    monkeypatch.setattr(sys, "argv", ["repeatability", "--output", str(tmp_path / "out.json"), "--", "--cpu"])
    assert repeatability.main() == 1
    assert "ceiling" in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["flags"] == ["--cpu"]
    assert written["figures"]["ceiling"]["agree"] is False
    assert written["measured"][1]["run"]["capacity"]["model"]["ceiling"] == 20_000.0
