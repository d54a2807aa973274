"""An interrupt that falls into a finalizer, where Python drops exceptions."""

import gc
import signal
import sys
import time

import pytest

from pybatch.commands.interrupting import interrupts_heard, termination_heard


class Dropped:
    def __init__(self):
        self.me = self  # a cycle: only the collector ends it

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


class Faulty:
    def __del__(self):
        raise ValueError("in a finalizer")


def work():
    gc.collect()
    time.sleep(5)


def test_an_interrupt_in_a_finalizer_is_raised_where_the_work_goes_on():
    Dropped()
    with pytest.raises(KeyboardInterrupt), interrupts_heard():
        work()


def test_other_faults_of_finalizers_are_told_as_before(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda fault: told.append(fault.exc_type))
    before = sys.unraisablehook
    with interrupts_heard():
        Faulty()
    assert told == [ValueError]
    assert sys.unraisablehook is before


def test_the_first_termination_interrupts_and_the_second_ends():
    before = signal.getsignal(signal.SIGTERM)
    with termination_heard():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before
