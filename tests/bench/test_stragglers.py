"""``bench/stragglers.py``: its result says how it was made."""

from __future__ import annotations

import argparse

import stragglers


def test_the_command_has_all_that_changes_the_result():
    options = argparse.Namespace(factors=[1.0, 2.5], seeds=[1, 2], epochs=3, seconds=8.0)
    assert stragglers.command(options) == (
        "python bench/stragglers.py --data DIR --factors 1 2.5 --seeds 1 2 --epochs 3 --seconds 8"
    )
