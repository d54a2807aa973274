"""Records in, verdict out: the batch to use, what it costs, and how sure that is. No torch."""
