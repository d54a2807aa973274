"""Where trials are trained: in this process, in child processes, or on a Ray cluster."""
