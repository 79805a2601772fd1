"""Benchmarks: what a checkpoint can do, beside the model it came from."""
