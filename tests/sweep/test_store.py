"""The store: whole or absent outcomes, one run a trial, and no foreign or damaged file touched."""

import contextlib
import math
import multiprocessing
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest

from pybatch.base.errors import StoreError, UsageError
from pybatch.records import Environment
from pybatch.scaling import Scaled
from pybatch.sweep import store as store_module
from pybatch.sweep.store import Store
from pybatch.training.trajectory import Trajectory
from pybatch.training.trial import Outcome, Trial

HERE = Environment("3.11", "Linux", "0", "2.13", None, None, None, 1, 0, "test")


def trial(seed=0):
    return Trial("w", "sgd", Scaled({"lr": 0.5, "betas": (0.9, 0.99)}), 8, seed, "fp32", "cpu")


def outcome(seed=0, last=10, end="met"):
    steps = np.arange(last + 1, dtype=np.int32)
    losses = np.exp(-steps / 3).astype(np.float32)
    losses[-1] = math.nan
    return Outcome(trial(seed), end, Trajectory(steps, losses, losses * 2), 0.25, "stacked")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs.db"


def test_what_is_put_reads_back(path):
    with Store(path, HERE) as store:
        store.put(outcome())
    with Store(path, HERE) as store:
        assert len(store) == 1
        [found] = store.outcomes([trial(), trial(1)]).values()
    assert (found.end, found.seconds, found.how) == ("met", 0.25, "stacked")
    np.testing.assert_array_equal(found.trajectory.train, outcome().trajectory.train)
    np.testing.assert_array_equal(found.trajectory.steps, outcome().trajectory.steps)


def test_a_row_holds_its_spec_and_environment_and_no_pickle(path):
    with Store(path, HERE) as store:
        store.put(outcome())
    db = sqlite3.connect(path)
    [(spec, text)] = db.execute("SELECT spec, json FROM trial JOIN environment ON number = environment")
    assert Trial.from_spec(spec).key == trial().key
    assert '"platform": "Linux"' in text
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    for (column,) in db.execute("SELECT train FROM trial"):
        assert column[:1] == b"\x78"  # zlib
    db.close()


def test_a_longer_run_replaces_a_shorter_one_and_not_the_reverse(path):
    with Store(path, HERE) as store:
        for last in (10, 30, 20):
            store.put(outcome(last=last))
        assert len(store) == 1
        assert store.outcomes([trial()])[trial().key].steps == 30


@pytest.mark.parametrize(
    ("again", "last"),
    [("met", 30), ("diverged", 10)],  # summed in another order it reaches by then, or breaks before
)
def test_a_run_made_again_for_its_answer_is_taken(path, again, last):
    """It was not, being no longer: the sweep that asked ran it for ever."""
    with Store(path, HERE) as store:
        store.put(outcome(last=30, end="capped"))
        store.put(outcome(last=last, end=again))
        assert store.outcomes([trial()])[trial().key].end == again


def test_a_claim_is_granted_once(path):
    keys = {trial(seed).key for seed in range(3)}
    with Store(path, HERE) as one, Store(path, HERE) as two:
        first = one.claim([trial(0).key, trial(1).key])
        assert first == {trial(0).key, trial(1).key}
        assert two.claim(keys) == keys - first
        assert one.claim(keys) == set()
        one.put(outcome(0))
        assert two.claim([trial(0).key]) == {trial(0).key}  # ended with its outcome: the store says it is there
        one.release([trial(1).key])
        assert two.claim([trial(1).key]) == {trial(1).key}


def test_closing_gives_claims_back(path):
    with Store(path, HERE) as one:
        one.claim([trial().key])
    with Store(path, HERE) as two:
        assert two.claim([trial().key]) == {trial().key}


def test_a_heart_beats_while_its_process_lives(path):
    def beat():
        with contextlib.closing(sqlite3.connect(path)) as db:
            return db.execute("SELECT beat FROM claim").fetchone()[0]

    with Store(path, HERE, lease=0.4) as one, Store(path, HERE, lease=0.4) as two:
        one.claim([trial().key])
        deadline = time.monotonic() + 60
        while beat() < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert beat() >= 3
        assert two.claim([trial().key]) == set()


@pytest.mark.parametrize("clock", [0.0, 1e12])
def test_a_claim_of_another_machine_ends_when_its_heart_stands_still(path, monkeypatch, clock):
    """By this process's own steady clock: wall clocks, here set far back or ahead, are not asked."""
    monkeypatch.setattr(time, "time", lambda: clock)
    with Store(path, HERE, lease=0.3) as store:
        with store._write():
            for seed, owner in enumerate(("elsewhere:1:0:x", "elsewhere:2:0:y", "of a foreign form")):
                store._db.execute("INSERT INTO claim VALUES (?, ?, 7)", (trial(seed).key, owner))
        keys = [trial(seed).key for seed in range(3)]
        assert store.claim(keys) == set()
        time.sleep(0.2)
        with store._write():
            store._db.execute("UPDATE claim SET beat = 8 WHERE owner LIKE 'elsewhere:2%'")
        assert store.claim(keys) == set()
        time.sleep(0.2)
        assert store.claim(keys) == {keys[0], keys[2]}


def test_a_claim_of_this_machine_ends_with_its_process_alone(path, monkeypatch):
    with Store(path, HERE, lease=0.05) as one, Store(path, HERE, lease=0.05) as two:
        monkeypatch.setattr(one, "_beat", None)
        one.claim([trial().key])
        one._closing.set()  # its heart stands still, and its process lives
        time.sleep(0.3)
        assert two.claim([trial().key]) == set()
        with two._write():
            here = one.owner.split(":")[0]
            two._db.execute("INSERT INTO claim VALUES (?, ?, 0)", (trial(1).key, f"{here}:{2**22 - 1}:17:x"))
        assert two.claim([trial(1).key]) == {trial(1).key}
        one._closing.clear()


def test_an_empty_file_is_no_store(path, monkeypatch):
    monkeypatch.setattr("pybatch.sweep.store.NEW", 0.1)
    path.touch()
    with pytest.raises(UsageError, match=r"is an empty file\. Delete it"):
        Store(path, HERE)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("column", ["steps", "train", "test"])
def test_what_unpacks_without_end_is_damage_and_fills_no_memory(path, column):
    with Store(path, HERE) as store:
        store.put(outcome())
        with store._write():
            store._db.execute(f"UPDATE trial SET {column} = ?", (zlib.compress(bytes(5 * 10**7), 1),))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(StoreError, match="holds over 1048576 bytes"):
            store.outcomes([trial()])
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # KiB


def test_a_killed_process_loses_its_claims_at_once_and_nothing_it_had_put(path):
    code = f"""
import sys, time
sys.path.insert(0, {os.path.dirname(__file__)!r})
from pathlib import Path
import test_store as t
store = t.Store(Path({str(path)!r}), t.HERE)
store.claim([t.trial(0).key, t.trial(1).key])
store.put(t.outcome(0))
print("ready", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"ready\n"
        with Store(path, HERE) as store:
            assert store.claim([trial(1).key]) == set()
        child.send_signal(signal.SIGKILL)
        child.wait()
    with Store(path, HERE) as store:
        assert len(store) == 1
        assert store.claim([trial(1).key]) == {trial(1).key}


def put_all(path, worker):
    """Claim and put trials until none is left; what was run is written down, so that a second run of one shows."""
    with Store(path, HERE) as store:
        ran = []
        for seed in range(30):
            if store.claim([trial(seed).key]):
                if trial(seed).key not in store.outcomes([trial(seed)]):
                    store.put(outcome(seed))
                    ran.append(seed)
                store.release([trial(seed).key])
        (path.parent / f"ran{worker}").write_text(" ".join(map(str, ran)))


def test_two_processes_share_a_store_and_run_each_trial_once(path):
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=put_all, args=(path, worker)) for worker in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    ran = [int(s) for worker in range(2) for s in (path.parent / f"ran{worker}").read_text().split()]
    assert sorted(ran) == list(range(30))
    with Store(path, HERE) as store:
        assert len(store) == 30


def test_a_foreign_file_is_refused_and_left(path):
    path.write_text("my notes\n")
    with pytest.raises(UsageError, match=r"runs\.db.*no SQLite file.*name another file"):
        Store(path, HERE)
    assert path.read_text() == "my notes\n"


def test_another_programs_database_is_refused_and_left(path):
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE mine (x)")
    db.commit()
    db.close()
    before = path.read_bytes()
    with pytest.raises(UsageError, match="another program"):
        Store(path, HERE)
    assert path.read_bytes() == before


def test_another_schema_is_refused(path):
    Store(path, HERE).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(UsageError, match=r"schema 9, this pybatch reads 4\. A later pybatch wrote it"):
        Store(path, HERE)


@pytest.mark.parametrize("cut", [0.5, 0.9])
def test_a_truncated_store_is_refused(path, cut):
    with Store(path, HERE) as store:
        for seed in range(60):
            store.put(outcome(seed, last=300))
    data = path.read_bytes()
    path.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(UsageError, match=r"damaged|malformed|cannot be used"):
        Store(path, HERE)


def test_a_store_with_random_bytes_in_it_is_refused(path):
    with Store(path, HERE) as store:
        for seed in range(60):
            store.put(outcome(seed, last=300))
    data = bytearray(path.read_bytes())
    data[4096 : 4096 * 4] = np.random.default_rng(0).bytes(4096 * 3)
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"damaged|malformed|cannot be used"):
        Store(path, HERE)


def test_a_folder_or_a_missing_one_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no file"):
        Store(tmp_path, HERE)
    with pytest.raises(UsageError, match=r"there is no folder '.*missing'. Make it"):
        Store(tmp_path / "missing" / "runs.db", HERE)


def test_in_memory_without_a_path():
    with Store(None, HERE) as store:
        assert store.claim([trial().key])
        store.put(outcome())
        assert len(store) == 1


def filled(path, count=60):
    with Store(path, HERE) as store:
        for seed in range(count):
            store.put(outcome(seed, last=300))


def test_a_page_damaged_after_opening_is_named_and_the_rest_is_kept(path):
    """Pages that were read before stay in SQLite's cache; this one is read for the first time after the damage."""
    filled(path)
    with Store(path, HERE) as store:
        store._db.execute("PRAGMA cache_size = 1")
        data = bytearray(path.read_bytes())
        middle = len(data) // 2 // 4096 * 4096
        data[middle : middle + 3 * 4096] = np.random.default_rng(0).bytes(3 * 4096)
        with path.open("r+b") as file:
            file.write(data)
        with pytest.raises(StoreError, match=r"runs\.db' cannot be read: .*damaged: name another file.*--resume"):
            store.outcomes([trial(seed) for seed in range(60)])


def test_a_trajectory_that_cannot_be_unpacked_names_the_store(path):
    """Where another process spoils it; one that is spoiled is refused when it is opened, and left as it is."""
    filled(path, 1)
    with Store(path, HERE) as store:
        db = sqlite3.connect(path)
        with db:
            db.execute("UPDATE trial SET train = X'00'")
        db.close()
        for use in (lambda: store.outcomes([trial()]), lambda: store.put(outcome(last=400))):
            with pytest.raises(StoreError, match=r"runs\.db' cannot be .*trajectory cannot be read"):
                use()
        assert store.claim([trial(1).key])  # the transaction that failed was rolled back
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r"runs\.db' is damaged: trial .*trajectory cannot be read.*restore it"):
        Store(path, HERE)
    assert path.read_bytes() == before


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_removed_or_replaced_in_flight_is_noticed_at_the_next_write(path, replaced):
    """SQLite itself would go on writing to the file that has no name any more."""
    with Store(path, HERE) as store:
        store.put(outcome(0))
        path.unlink()
        if replaced:
            Store(path, HERE).close()
        with pytest.raises(StoreError, match=r"removed or replaced while it was in use.*--resume"):
            store.put(outcome(1))
    assert path.exists() == replaced


def put_many(store):
    for seed in range(1, 100):
        store.put(outcome(seed, last=3000))


def test_a_full_disk_says_to_free_space_and_loses_nothing_that_was_put(path):
    with Store(path, HERE) as store:
        store.put(outcome(0))
        [pages] = store._db.execute("PRAGMA page_count").fetchone()
        store._db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreError, match=r"full\. Free space on its disk, then run .*--resume"):
            put_many(store)
        kept = len(store)
    with Store(path, HERE) as store:
        assert len(store) == kept >= 1
        store.put(outcome(200))


def test_a_lock_held_beyond_the_wait_says_so(path, monkeypatch):
    monkeypatch.setattr(store_module, "BUSY", 0.05)
    with Store(path, HERE) as store:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"locked\. Another program holds it: end that one"):
            store.put(outcome())
        with pytest.raises(UsageError, match=r"cannot be used: database is locked\. Another program holds it"):
            Store(path, HERE)
        other.execute("COMMIT")
        other.close()
        store.put(outcome())
        assert len(store) == 1


def test_a_store_that_turned_read_only_says_so(path):
    with Store(path, HERE) as store:
        store._db.execute("PRAGMA query_only = 1")
        with pytest.raises(StoreError, match=r"readonly database\. Make file and folder writable"):
            store.put(outcome())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UsageError, match="Make file and folder writable"):
            Store(tmp_path / "runs.db", HERE)
    finally:
        tmp_path.chmod(0o700)


def test_the_heart_outlives_a_damaged_file(path):
    with Store(path, HERE, lease=0.2) as store:
        store.claim([trial().key])
        with store._write():
            store._db.execute("DROP TABLE claim")
        time.sleep(0.3)
        assert store._heart.is_alive()


def test_a_sweep_whose_store_fails_gives_what_is_done(path, monkeypatch):
    from pybatch.sweep.measurement import measure_convergence
    from pybatch.workloads.running.finding import find

    put, done = Store.put, []

    def failing(self, outcome):
        done.append(outcome.trial.batch)
        if len(set(done)) > 2:
            raise StoreError("store 'x' cannot be written: full. Free space.")
        put(self, outcome)

    monkeypatch.setattr(Store, "put", failing)
    found = measure_convergence(
        find("quadratic"), [2, 4, 8, 16], seeds=1, rates=[0.1, 0.2], target={"train": 1.0}, device="cpu", store=path
    )
    assert not found.complete
    assert any("Free space" in note.text for note in found.notes)
    assert len(found.curves[0].points) == 2
