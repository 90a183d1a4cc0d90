"""ffmpeg is missing, hangs, dies or writes something else; the scene must not suffer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from faults.files import half_way
from faults.runs import Undisturbed, differences, results, start
from faults.table import Row
from fourdfy.files import images

BROKEN = {
    "missing": None,
    "not executable": "",
    "failing": "#!/bin/sh\nexit 1",
    "killed": "#!/bin/sh\nkill -9 $$",
    "hanging": "#!/bin/sh\nexec sleep 60",
    "hanging after its input": "#!/bin/sh\ncat > /dev/null\nexec sleep 60",
    "reading nothing": "#!/bin/sh\nexec <&-\nexit 0",
    "writing nothing": "#!/bin/sh\ncat > /dev/null",
    "writing garbage": '#!/bin/sh\ncat > /dev/null\nfor last; do :; done\necho garbage > "$last"',
    "talking without end": "#!/bin/sh\nexec yes >&2",
}
"""Kinds of ffmpeg, and the scripts that stand for them."""


def encoders(count: int, seed: int, folder: Path, reference: Undisturbed) -> Iterator[Row]:
    """Each kind of ffmpeg in a run that is half way."""
    base, row = half_way(folder, reference), Row(f"ffmpeg {', '.join(BROKEN)}")
    for kind, script in [*BROKEN.items()][:count]:
        root, program = folder / "encoder", folder / "ffmpeg"
        shutil.copytree(base, root)
        program.unlink(missing_ok=True)
        if script is not None:
            program.write_text(script, encoding="utf-8")
            program.chmod(0o755 if script else 0o644)

        def use(program: Path = program) -> None:
            os.environ["IMAGEIO_FFMPEG_EXE"] = str(program)
            images.ENCODER_SECONDS = images.ENCODER_SECONDS_PER_FRAME = 0.1

        child = start(reference.command(root), folder / "log.txt", use)
        status, said = child.wait(), child.said()
        wrong = [] if status == 0 and "ffmpeg" in said else [f"status {status}: {said[-3000:]}"]
        expected = {name: value for name, value in reference.results.items() if not name.endswith(".mp4")}
        found = {name: value for name, value in results(root).items() if name in expected}
        wrong += differences(found, expected)
        row.add("a warning, and the same scene and pictures", [f"{kind}: {entry}" for entry in wrong])
        shutil.rmtree(root)
    yield row
