"""Device code. The Python files are the Triton twins of the C++ rules beside them; `pybatch.ops` is their only user."""
