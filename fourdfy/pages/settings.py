"""Settings as pages show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from fourdfy.pages.page import preformatted


def settings_text(values: Mapping[str, Any]) -> str:
    """Settings as YAML, which is shown when its title is pressed."""
    written = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=100)
    return f"<details><summary>All settings that make the scene</summary>{preformatted(written)}</details>"


def without_folders(value: Any) -> Any:
    """Settings in which nothing tells where on the sender's disk a file is: its name remains."""
    if isinstance(value, Mapping):
        return {key: without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(entry) for entry in value]
    is_path = isinstance(value, str) and (value.startswith(("/", "~", "\\")) or value[1:3] in (":\\", ":/"))
    return value.replace("\\", "/").rstrip("/").rpartition("/")[2] if is_path else value


def flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inside = flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
        found |= inside
    return found
