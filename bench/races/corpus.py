"""The text that races are run on."""

from __future__ import annotations

import gzip
import os
import re
from functools import lru_cache
from pathlib import Path


def corpus_path() -> Path:
    """Return the text that CORPUS names.

    Raises:
        ValueError: it is not set, or no file.
    """
    path = os.environ.get("CORPUS")
    if path is None:
        raise ValueError("CORPUS is not set: the path of a text, plain or gzipped")
    if not Path(path).is_file():
        raise ValueError(f"CORPUS is no file: {path}")
    return Path(path)


@lru_cache
def text() -> list[str]:
    """Its words and signs."""
    path = corpus_path()
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    return re.findall(r"[a-z']+|[^\sa-z']", raw.decode("utf-8", "replace").lower())
