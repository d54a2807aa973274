"""Workloads: what is trained while pybatch measures."""
