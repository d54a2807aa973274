"""Devices: which one, what it is, its measured ceilings, its counters."""
