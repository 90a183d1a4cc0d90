"""Faults that ``benchmarks/reliability.py`` plants in runs, a file for each kind."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))  # for the tests' small runs
