"""The benchmark's script still runs."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "renderer_memory.py"


def test_it_runs_at_toy_size(capsys):
    spec = importlib.util.spec_from_file_location("renderer_memory_benchmark", SCRIPT)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    benchmark.main(["--toy", "--device", "cpu"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [row[0].strip("| ") for row in rows] == ["nerf", "exact", "subset"]
    assert len({row[2] for row in rows}) == 1 and rows[0][2] != "0", "all render the same samples"
