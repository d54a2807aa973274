"""The main jobs, each a workload in and a run out: bench, sweep, several devices, going on with a run that was cut."""
