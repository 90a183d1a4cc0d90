"""Lightning stays behind one door."""

import subprocess
import sys

from tests.commands import CONFIGS

TYPO = """
import sys
from fourdfy.launching.cli import main
given = ["--gpu", "cpu", "system.prompt_processor.prompt=a", "sed=1"]
status = main(["--config", sys.argv[1], "--train", *given])
print(status, [name for name in sys.modules if "lightning" in name and "fourdfy" not in name])
"""


def test_a_typo_is_found_without_importing_lightning():
    config = str(CONFIGS / "shapes_stage_1.yaml")
    told = subprocess.run([sys.executable, "-c", TYPO, config], capture_output=True, text=True, check=True)
    assert told.stdout == "2 []\n"
    assert "did you mean 'seed'" in told.stderr
