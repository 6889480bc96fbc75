"""Committed results and the tables made from them.

    python bench/tables.py measure [--suite step ...] [--only 64/256]   interleaved timings
    python bench/tables.py measure --suite step --avx2                  all kernels kept to AVX2
    python bench/tables.py errors --data DIR [--only 64/256]            test errors of the same rows
    python bench/tables.py render [--check]                             rewrite the tables

What ``bench/gpu.sh`` measured (its kernels.json) becomes part of them as
``bench/results/<device>-gpu.json``; of two calls apart, joined by ``bench/gpu_kernels.py --join``.

``measure`` takes every group of candidates *together* (``fused_dni.measure.timing.compare``),
checks each candidate first (``check_*`` of its workload) and merges what it measured into
``bench/results/<device>-cpu.json`` (``-lstm.json`` for that suite), so that single groups can be
measured again; those with ``--avx2`` lie beside the native ones under a name that says so. A
candidate that fails its check, or that cannot run, stands in the table with that
reason and no figure. Measure on an otherwise idle machine: two thread pools on the same cores cost
each other factors.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import measuring
from groups import keep_to_avx2
from pages import documents


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("measure", help="time everything, or --suite and --only of it")
    sub.add_argument("--suite", action="append", choices=measuring.SUITES)
    sub.add_argument("--only", help="only groups whose name contains this")
    sub.add_argument("--seconds", type=float, default=10.0, help="timed seconds a group")
    sub.add_argument("--avx2", action="store_true", help="on no wider vectors, PyTorch too")
    sub.add_argument("--out", type=Path)
    sub = commands.add_parser("errors", help="train every row of the step table")
    sub.add_argument("--data", metavar="DIR", help="folder of the MNIST files; digits without")
    sub.add_argument("--only", help="only rows whose name contains this")
    sub.add_argument("--epochs", type=int, default=5)
    sub.add_argument("--seeds", type=int, default=1)
    sub.add_argument("--keep", action="store_true", help="leave rows that already have errors")
    sub.add_argument("--out", type=Path)
    sub = commands.add_parser("render", help="rewrite the tables of the documents")
    sub.add_argument("--check", action="store_true", help="change nothing, fail if they differ")
    given = parser.parse_args(arguments)
    if given.command == "measure":
        if given.avx2:
            keep_to_avx2()
        measuring.measure(
            given.suite or list(measuring.SUITES), given.only, given.seconds, given.out
        )
        return 0
    if given.command == "errors":
        measuring.errors(given.data, given.only, given.epochs, given.seeds, given.out, given.keep)
        return 0
    return documents.render(given.check)


if __name__ == "__main__":
    sys.exit(main())
