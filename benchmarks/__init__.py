"""Benchmarks: each is a module with a `main`, prints a table and compares with a reference in the same run."""
