"""Benchmarks: problems in, generations kept, scores with intervals out."""
