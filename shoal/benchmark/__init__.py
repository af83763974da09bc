"""Benchmarks that know an engine only from outside: by HTTP, or as a program beside it. `shoal bench` runs them."""
