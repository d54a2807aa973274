"""Steps to target by training: trials, replicas, the store, sweeps, branches."""
