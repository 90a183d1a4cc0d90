"""Faults that ``benchmarks/reliability.py`` plants in runs, a file for each kind."""
