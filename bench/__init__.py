"""Benchmarks that print what this machine does: `python -m bench.NAME`, or `pytrain bench NAME` when installed."""
