import dataclasses
import json

import pytest

from pybatch.base.errors import UsageError
from pybatch.fits.steps import fit_steps
from pybatch.records import Convergence, ConvergencePoint, Curve, Run, to_dict

# The record: what readers of saved files rely on.
KEYS = {
    None: "schema created environment device ceilings workload batches capacity noise convergence verdict",
    "ceilings": "gemm_flops copy_bytes_per_s datasheet_flops",
    "workload": "name unit parameters dtype",
    "capacity": "t0_ms ceiling_samples_per_s half_batch saturation_batch saturation_low saturation_high max_batch "
    "max_batch_verified model",
    "noise": "b_simple low high grad_sq trace status source steps preconditioned layers",
    "verdict": "critical_batch critical_source saturation_batch best_batch limit useful_devices time_to_target text",
}
BATCH_KEYS = (
    "batch status step_ms step_ms_low step_ms_high samples_per_s host_bound model_flops mfu_measured mfu_datasheet "
    "sm_active sm_occupancy tensor_active dram_active memory_bytes joules_per_sample sm_clock_mhz throttled"
)


@pytest.mark.parametrize("section", KEYS)
def test_the_json_has_the_keys_of_the_schema(run, section):
    data = json.loads(run.to_json())
    assert set(KEYS[section].split()) <= set(data[section] if section else data)


def test_every_batch_has_the_keys_of_the_schema(run):
    for row in json.loads(run.to_json())["batches"]:
        assert set(BATCH_KEYS.split()) <= set(row)


def test_sections_are_not_written_twice(run):
    assert {"device", "ceilings", "workload", "batches"}.isdisjoint(json.loads(run.to_json())["capacity"])


def test_a_saved_run_reads_back_equal(run):
    point = ConvergencePoint(8, 120.0, "reached", 3, 0.1)
    curve = Curve("sqrt", "train", (point,), 40.0, 105.0, 90.0, 120.0, 0.1, ((8, "linear"),))
    run = dataclasses.replace(run, convergence=Convergence((curve,)))
    assert Run.from_json(run.to_json()) == run


def test_a_sweep_alone_keeps_its_workload_and_device(run):
    """They stand at the top of the JSON, beside the section, as those of a capacity do."""
    where = {"device": run.capacity.device, "workload": run.capacity.workload}
    alone = Run(run.created, run.environment, convergence=Convergence((), optimizer="SGD", **where))
    assert json.loads(alone.to_json())["workload"]["name"] == "digits"
    assert Run.from_json(alone.to_json()) == alone


def test_a_run_without_sections_reads_back(run):
    bare = Run(run.created, run.environment, complete=False)
    assert Run.from_json(bare.to_json()) == bare


def test_json_holds_no_nan(run):
    broken = dataclasses.replace(run, noise=dataclasses.replace(run.noise, trace=float("nan"), high=float("inf")))
    data = json.loads(broken.to_json(), parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))
    assert data["noise"]["trace"] is None
    assert data["noise"]["high"] is None


def damaged(run, **changes):
    return json.dumps(to_dict(run) | changes)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": "pybatch/0"}, "has schema 'pybatch/0', this pybatch reads 'pybatch/1'"),
        ({"schema": None}, "has schema None"),
        ({"surprise": 1}, "record has unknown keys ['surprise']"),
        ({"noise": [1]}, r"record.noise is \[1\]"),
        ({"noise": {"low": 1.0}}, "record.noise is incomplete"),
        ({"batches": 3}, "record.capacity.batches is 3"),
        ({"batches": [{"batch": 1, "status": "fine"}]}, "status is 'fine'"),
        ({"created": 7}, "record.created is 7"),
        ({"capacity": "big"}, "record.capacity is 'big'"),
    ],
)
def test_a_foreign_or_damaged_record_is_refused_by_name(run, change, says):
    with pytest.raises(UsageError, match=says.replace("['", r"\['").replace("']", r"'\]")):
        Run.from_json(damaged(run, **change))


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "not json"])
def test_what_is_no_record_is_refused(text):
    with pytest.raises(UsageError, match="record"):
        Run.from_json(text)


def test_why_gives_the_chain_or_the_choices(run):
    assert run.verdict.why("best_batch").inputs == {"critical_batch": 40.0}
    with pytest.raises(UsageError, match=r"no figure .speed. in this verdict. Ask for one of: best_batch"):
        run.verdict.why("speed")


@pytest.mark.parametrize("model", [None, "power"])
def test_a_fit_with_too_few_runs_for_some_models_reads_back(run, model):
    """One seed at five batch sizes: AICc is not defined for models of three unknowns."""
    fit = fit_steps([16, 32, 64, 128, 256], [420, 230, 130, 80, 56], model=model)
    curve = Curve("tuned", "train", (), fit.s_min, fit.critical_batch, fit.low, fit.high, 0.1, fit=fit)
    run = dataclasses.replace(run, convergence=Convergence((curve,)))
    assert Run.from_json(run.to_json()).convergence == run.convergence
