"""Benchmarks of each op and of whole steps, with peers timed in the same run."""
