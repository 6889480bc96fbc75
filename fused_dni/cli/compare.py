"""``compare``: two files of results against each other."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fused_dni.cli.arguments import PROGRAM, common, rate
from fused_dni.cli.output import OutFile, say


def add_compare(commands: Any) -> None:
    made = commands.add_parser(
        "compare",
        help="two files of results: what became faster, what slower, what cannot be told",
        description="Compare two files by `pytest bench --benchmark-json`, or two reports of one "
        "kind, benchmark by benchmark. Two runs are not interleaved: differences within what the "
        "benchmarks' own floors changed by are inconclusive.",
        epilog=f"example: {PROGRAM} compare before.json after.json --fail-on-slower",
    )
    made.add_argument("old", metavar="OLD.json")
    made.add_argument("new", metavar="NEW.json")
    made.add_argument(
        "--noise",
        type=rate,
        metavar="FRACTION",
        help="what the same code changes by between two runs (as the floors in the files did)",
    )
    made.add_argument(
        "--force", action="store_true", help="even if machines, versions or settings differ"
    )
    made.add_argument(
        "--fail-on-slower", action="store_true", help="exit status 1 if anything is slower"
    )
    made.add_argument("--json", action="store_true", help="print the comparison as JSON on stdout")
    made.add_argument("--out", metavar="FILE", help="write the JSON into a file, too")
    common(made, threads=False)
    made.set_defaults(run=_compare, check=_check)


def _check(args: argparse.Namespace) -> None:
    """Refuse what are no results."""
    from fused_dni.report.times import read

    for name in (args.old, args.new):
        read(name)


def _compare(args: argparse.Namespace, command: str) -> int:
    from fused_dni.measure.compare import blocks, compare, read
    from fused_dni.report import as_text
    from fused_dni.report.files import as_json

    out = OutFile("--out", args.out)
    names = Path(args.old).name, Path(args.new).name  # without the reader's folders
    found = compare(
        read(args.old),
        read(args.new),
        noise=args.noise,
        force=args.force,
        command=f"{PROGRAM} compare {' '.join(names)}",
    )
    out.write(as_json(found))
    say(as_json(found) if args.json else as_text(blocks(found)), end="" if args.json else "\n")
    out.finish()
    slower = any(row["verdict"] == "slower" for row in found["rows"])
    return 1 if slower and args.fail_on_slower else 0
