"""pybatch."""
