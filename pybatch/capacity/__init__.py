"""Capacity: throughput against batch size, and the largest batch that fits."""
