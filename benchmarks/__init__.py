"""Benchmarks: what the service costs, beside its peers, in one run on one machine. `python -m benchmarks --help`."""
