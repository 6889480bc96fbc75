"""The rates that ``python bench/rates.py`` has chosen."""

from __future__ import annotations

import json
from pathlib import Path

#: By race, arm and multiple of a rate what it ended with: the lowest is taken.
RATES = Path(__file__).with_name("rates.json")


def multiple(race: str, arm: str, otherwise: int) -> int:
    """Return the best multiple of the rate for an arm, or another where none was tried."""
    tried = json.loads(RATES.read_text(encoding="utf-8")) if RATES.exists() else {}
    found = tried.get(race, {}).get(arm)
    return int(min(found, key=found.get)) if found else otherwise
