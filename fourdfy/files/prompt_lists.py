"""Lists of prompts: text files with one in each line, or the ``prompts`` of a sweep's YAML file."""

from __future__ import annotations

import logging
from pathlib import Path

from fourdfy.config_files import ConfigError, plain, read_layers

logger = logging.getLogger(__name__)


def read_prompts(file: Path, key: str = "prompts") -> list[str]:
    """The prompts of a file; in a text file, lines that begin with ``#`` are comments, and one that is there
    again does not count.

    Args:
        key: that names the file, for messages.

    Raises:
        ConfigError: it can't be read, or has none.
    """
    if file.suffix in (".yaml", ".yml"):
        found = plain(read_layers(file)[-1]).get("prompts")
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise ConfigError(f"{key}: {file}: expected a list of texts as its prompts")
        return _some(found, f"{key}: {file}")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"{key}: {file}: expected a list, or a text file of prompts ({why})") from error
    texts = [text for line in lines if (text := line.strip()) and not text.startswith("#")]
    if len(known := dict.fromkeys(texts)) < len(texts):
        again = next(text for index, text in enumerate(texts) if text in texts[:index])
        logger.warning("%s: %s: %r is there more than once; it counts once", key, file, again)
    return _some([*known], f"{key}: {file}")


def _some(texts: list[str], where: str) -> list[str]:
    if not texts or not all(text.strip() for text in texts):
        raise ConfigError(
            f"{where}: there are none, or empty ones; expected one prompt in each line or entry"
        )
    return texts
