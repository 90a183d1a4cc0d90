"""Text encoders that a model holds in float32, kept in bfloat16 once they were converted.

T5 and its kin have 19 to 23 GB in float32, half of that in bfloat16, and are read again for every new prompt.
"""

from __future__ import annotations

import logging
import shutil
from hashlib import blake2b
from pathlib import Path

from fourdfy.files.atomic import by_product, free_bytes
from fourdfy.priors.base import Network
from fourdfy.priors.hub import cache_root
from fourdfy.priors.model_folder import description_file, part_flaw, weight_files

logger = logging.getLogger(__name__)

SHARD = "2GB"
"""What is in memory once more while it is written."""


def converted_once(folder: Path, part: str) -> Path:
    """The folder that holds ``part`` in bfloat16, or else ``folder``, which holds it as it was published."""
    copy = _copy_of(folder, part)
    return folder if part_flaw(copy, part) else copy


def keep_converted(network: Network, folder: Path, part: str) -> None:
    """Keep the ``network``, in bfloat16, that ``folder`` has as ``part`` in float32.

    Nothing happens if ``folder`` has it in 16 bits, or if the copy would take more than half of the space.
    """
    from filelock import FileLock

    copy, size = _copy_of(folder, part), 2 * network.num_parameters()
    if sum(path.stat().st_size for path in weight_files(folder, part).paths) < 1.5 * size:
        return
    unfinished = copy.with_name(f"{copy.name}.part")
    with by_product("the copy of a text encoder in bfloat16"):
        copy.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(copy.with_name(f"{copy.name}.lock")):
            if not part_flaw(copy, part) or (free_bytes(copy.parent) or 0) < 2 * size:
                return
            for leftover in (unfinished, copy):
                shutil.rmtree(leftover, ignore_errors=True)
            network.save_pretrained(unfinished / part, max_shard_size=SHARD)
            unfinished.rename(copy)
            logger.info("the text encoder is kept in bfloat16, %.1f GB, in %s", size / 1e9, copy)


def _copy_of(folder: Path, part: str) -> Path:
    """The folder of the copy, existing or not; a changed part has another one."""
    paths = (description_file(folder, part), *weight_files(folder, part).paths)
    files = ((path.name, path.stat()) for path in paths)
    stamps = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    identity = f"{folder.resolve()} {part} {stamps}"
    return cache_root() / "bfloat16" / blake2b(identity.encode(), digest_size=16).hexdigest()
