"""Benchmarks: what every op costs, against every way of writing it in plain PyTorch."""
