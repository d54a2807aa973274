"""Fits of measurements, with intervals: step time, communication, steps to a target. No torch here."""
