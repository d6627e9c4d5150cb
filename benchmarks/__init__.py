"""Benchmarks: every figure beside a peer's from the same run."""
