"""Benchmarks that print what this machine does: `python -m bench.NAME`, or installed `pytrain bench NAME`."""
