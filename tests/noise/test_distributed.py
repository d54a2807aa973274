"""DDP and FSDP2 in several processes against the float64 truth of one; the cases are in noise_worker.py."""

import pytest
from cases.noise_models import same


def test_ddp_equals_one_process(ranks):
    """Total and every parameter, in several buckets, with unequal batches; training is untouched."""
    for rank in ranks:
        found, want = rank["plain"]
        same(found, want)
        assert found["steps"] == 4
        assert want["drift"] == 0.0
        assert found["layers"].keys() == want["layers"].keys()
        for name, values in want["layers"].items():
            assert found["layers"][name] == pytest.approx(values, rel=1e-3, abs=1e-5)


def test_every_process_knows_the_same(ranks):
    for case in ranks[0]:
        assert all(rank[case] == ranks[0][case] for rank in ranks)


def test_weighted_by_examples(ranks):
    found, want = ranks[0]["weighted"]
    same(found, want)
    world = len(ranks)
    assert found["large"] == sum(2 + 3 * r for r in range(world))
    assert found["small"] == pytest.approx(found["large"] / world)


def test_accumulation_under_no_sync(ranks):
    found, want = ranks[0]["no_sync"]
    same(found, want)
    assert found["small"] > 4


def test_a_second_synchronization_is_left_out_and_said(ranks):
    found, want = ranks[0]["synchronized_twice"]
    same(found, want)
    assert found["steps"] == 2
    assert any("2 backward passes synchronized again" in text for text in found["notes"])


def test_the_users_own_hook_runs_inside(ranks):
    found, want = ranks[0]["own_hook"]
    same(found, want, rel=5e-3)  # the mean is rounded to fp16
    assert want["same"]
    assert (found["steps"], found["before"]) == (2, 0)
    assert "hook=your_hook" in want["refused"]["registered"]
    assert "Call its detach() first" in want["refused"]["attached"]


def test_a_process_without_batches_counts_for_nothing(ranks):
    found, want = ranks[0]["uneven"]
    same(found, want)
    assert found["steps"] == want["steps"] == (3 if len(ranks) > 2 else 2)


def test_preconditioned_and_not_finite_somewhere(ranks):
    found, want = ranks[0]["preconditioned"]
    same(found, want, rel=1e-3)
    assert found["skipped"] == 1


def test_moments_are_of_the_mean_over_processes(ranks):
    found, want = ranks[0]["moments"]
    assert found["small"] == want["small"]
    assert any("every process" in text for text in found["notes"])
    assert "Use source 'ddp'" in want["refused"]


def test_fsdp_equals_one_process(processes):
    found, want = processes[2][0]["fsdp"]
    same(found, want)
    assert found["steps"] == 3
    for name, values in want["layers"].items():
        assert found["layers"][name] == pytest.approx(values, rel=1e-3, abs=1e-5)


def test_fsdp_accumulation(processes):
    found, want = processes[2][0]["fsdp_accumulated"]
    same(found, want)
    assert (found["steps"], found["skipped"]) == (3, 1)


def scaled(rank, case):
    found, want = rank[case]
    assert (found["steps"], found["skipped"]) == (want["steps"], want["skipped"])
    assert want["skipped"] >= 3
    assert want["steps"] >= 4
    same(found, want, rel=1e-3)
    assert not any("synchronized again" in text for text in found["notes"])


def test_loss_scale_that_overflows_under_ddp(ranks):
    scaled(ranks[0], "ddp_scaled")


def test_loss_scale_that_overflows_under_fsdp(processes):
    scaled(processes[2][0], "fsdp_scaled")


def dropout(rank, case):
    """Each process's own masks in training, none in evaluation; other masks, or none, would be noticed."""
    found, want = rank[case]
    training = not case.endswith("eval")
    same(found, want["own"])
    assert want["differ"] == training
    for way in ("redrawn", "ignored"):
        gap = abs(want[way]["trace"] / want["own"]["trace"] - 1)
        assert (gap > 1e-2) if training else (gap < 1e-6)
    assert any("dropout was active" in text for text in found["notes"]) == training


@pytest.mark.parametrize("case", ["ddp_dropout", "ddp_dropout_eval"])
def test_dropout_under_ddp(ranks, case):
    dropout(ranks[0], case)


@pytest.mark.parametrize("case", ["fsdp_dropout", "fsdp_dropout_eval"])
def test_dropout_under_fsdp(processes, case):
    dropout(processes[2][0], case)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_watched_training_of_several_processes(processes, kind):
    """All processes replay the same sizes by one clock, and the training goes on to the bit as unwatched."""
    found = [rank[f"{kind}_watched"][0] for rank in processes[2]]
    assert all(one["same"] for one in found)
    assert found[0]["batches"] == found[1]["batches"] == [2, 4, 8, 16, 32, 64, 128]  # of 4 + 6 examples: 4 each
    assert found[0]["step_ms"] == found[1]["step_ms"]
    assert (found[0]["source"], found[0]["devices"]) == (kind, 2)
    assert found[0]["pairs"] >= 15
    assert found[0]["found"] == {"ddp": ["DDP"], "fsdp": ["FSDP2"]}[kind]
    assert found[0]["device"].startswith("2 processes on ")


def test_the_example_measures_the_same_under_ddp_and_fsdp2(processes):
    ddp, fsdp = (processes[2][0][case] for case in ("ddp_example", "fsdp_example"))
    assert ddp.startswith("ddp: B_simple ")
    assert "(resolved, by ddp" in ddp
    assert fsdp == ddp.replace("ddp", "fsdp")
