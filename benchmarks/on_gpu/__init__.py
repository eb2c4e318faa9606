"""
The benchmarks and the GPU tests, in one command for a machine that is lent for a few minutes and has no network.

This package needs the standard library alone, because it also makes the environment in which the benchmarks run.
"""
