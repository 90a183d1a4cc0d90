"""Folder names made from what a user typed."""

from __future__ import annotations

import hashlib
import unicodedata

MAX_TAG_BYTES = 100


def sanitize_tag(text: str) -> str:
    """A folder name made from a prompt: at most 100 bytes, no separators, no leading dots.

    Spaces become underscores, as in threestudio's configs. If anything else changes, a hash of the text
    keeps two prompts from sharing a folder.
    """
    plain = text.replace(" ", "_")
    safe = "".join(
        letter if unicodedata.category(letter)[0] in "LMN" or letter in "_-.,'!+=@()" else "_"
        for letter in unicodedata.normalize("NFC", plain)
    )
    safe = safe.lstrip(".-")
    if safe == plain and safe and not safe.endswith(".") and len(safe.encode()) <= MAX_TAG_BYTES:
        return safe
    digest = hashlib.blake2b(plain.encode(errors="surrogatepass"), digest_size=4).hexdigest()
    kept = safe.encode()[: MAX_TAG_BYTES - len(digest) - 1].decode(errors="ignore")
    return f"{kept.rstrip('.')}-{digest}".lstrip("-")
