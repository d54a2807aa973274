"""How a workload is run: found, packed for another process, compiled, and driven step by step."""
