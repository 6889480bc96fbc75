"""For tests/ and bench/ alike: what is marked ``gpu`` is skipped, and says why, without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with slow tests first, by the seconds that their mark states: where several processes
    # take a file each, none starts the longest when the others are done.
    seconds: dict[Path, float] = {}
    for item in items:
        for mark in item.iter_markers("slow"):
            seconds[item.path] = max(seconds.get(item.path, 0), *mark.args, 10)
    items.sort(key=lambda item: -seconds.get(item.path, 0))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device: torch.cuda.is_available() is false")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
