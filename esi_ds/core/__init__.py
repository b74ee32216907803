"""The mathematics of ESI on local tensors: one process, no communication."""
