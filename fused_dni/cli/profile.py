"""``profile``."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_dni.cli.arguments import (
    PROGRAM,
    UsageError,
    common,
    positive,
    refuse_unwritable,
    set_threads,
    whole,
)
from fused_dni.cli.output import OutFile, say, warn

if TYPE_CHECKING:
    from fused_dni.report import Result

#: Options that only some of the tools have.
BELONGS: dict[str, tuple[str, ...]] = {
    "seconds": ("torch",),
    "range": ("nsys", "ncu"),
    "kernels": ("ncu",),
    "skip": ("ncu",),
    "count": ("ncu",),
}


def add_profile(commands: Any) -> None:
    profile = commands.add_parser(
        "profile",
        usage=f"{PROGRAM} profile {{nsys,ncu,torch}} [options] -- COMMAND ...",
        help="run a command under Nsight Systems, Nsight Compute or torch.profiler",
        description="Run a command under a profiler, with ranges named after layer and phase: nsys "
        "for a timeline of launches, ncu for a table of kernels against the GPU's ceilings, torch "
        "for a trace and a table by range and op, which needs no GPU. The command's exit status is "
        "passed on.",
        epilog=f"examples:\n  {PROGRAM} profile torch -- python train.py --epochs 1\n"
        f"  {PROGRAM} profile nsys -- {PROGRAM} train --epochs 1\n"
        f"  {PROGRAM} profile ncu --range 'blocks.3: step' -- python train.py\n"
        f"  {PROGRAM} report runs/profile/profile.json -o profile.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    profile.add_argument("tool", choices=("nsys", "ncu", "torch"))
    what = profile.add_argument_group("what is recorded")
    what.add_argument(
        "--seconds",
        type=positive("seconds"),
        help="torch: of recording, from the first call of a module (5)",
    )
    what.add_argument(
        "--range",
        metavar="NAME",
        help="nsys: the first range of this name alone; ncu: launches in such ranges alone",
    )
    what.add_argument(
        "--kernels",
        metavar="FILTER",
        help="ncu: names of kernels, as NAME or regex:PATTERN (our own)",
    )
    what.add_argument("--skip", type=whole(0, "skip"), metavar="N", help="ncu: launches (0)")
    what.add_argument("--count", type=whole(1, "count"), metavar="N", help="ncu: launches (50)")
    out = profile.add_argument_group("output")
    out.add_argument("--out", metavar="DIR", default="runs/profile", help="(runs/profile)")
    out.add_argument(
        "--json",
        action="store_true",
        help="the report as JSON on stdout; what the command prints goes to stderr",
    )
    out.add_argument("--quiet", action="store_true", help="neither the command line nor the table")
    common(profile)
    profile.set_defaults(run=_profile)


def _profile(args: argparse.Namespace, command: str) -> int:
    words = args.behind
    if not words:
        raise UsageError(f"what is to be profiled? {PROGRAM} profile {args.tool} -- COMMAND ...")
    for name, tools in BELONGS.items():
        if getattr(args, name) is not None and args.tool not in tools:
            raise UsageError(
                f"--{name} does not go with {args.tool}, but with {' and '.join(tools)}"
            )
    body: dict[str, Any] = {"tool": args.tool, "profiled": words}
    folder = Path(args.out)
    made = _in_this_process(args, folder) if args.tool == "torch" else _by_nsight(args, folder)
    if made is None:
        return 1
    from fused_dni.measure.baseline import facts
    from fused_dni.report.files import as_json
    from fused_dni.report.schema import Result

    report = Result("profile", facts=facts(command), body={**body, **made})
    out = OutFile("--out", str(folder / "profile.json"))
    out.write(as_json(report))
    _print(args, report, out)
    out.finish()
    return int(report["status"])


def _in_this_process(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from fused_dni.measure.profile import trace
    from fused_dni.measure.profile.command import InProcess

    profiled = InProcess(args.behind)
    refuse_unwritable(args.out)
    set_threads(args)
    aside = contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()
    file = folder / "trace.json.gz"
    with aside:
        status, found = trace.record(profiled.run, file, args.seconds or 5.0)
    return {"status": status, "trace": file.name, **found}


def _by_nsight(args: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """The report's part; None, and a line that says why, if there is no such tool."""
    from fused_dni.annotate import VARIABLE
    from fused_dni.measure.profile import ncu, nsys
    from fused_dni.measure.profile.command import as_process

    profiled = as_process(args.behind)
    refuse_unwritable(args.out)
    if args.tool == "nsys":
        line = nsys.line(profiled, folder, args.range)
    else:
        line = ncu.line(
            profiled,
            folder,
            only=args.range,
            kernels=args.kernels or ncu.OURS,
            skip=args.skip or 0,
            count=args.count or 50,
        )
    tool = nsys if args.tool == "nsys" else ncu
    missing = shutil.which(args.tool) is None
    if missing or not args.quiet:
        warn(f"{VARIABLE}=1 {shlex.join(line)}")
    if missing:
        warn(f"{PROGRAM}: error: {tool.MISSING}")
        return None
    environment = {**os.environ, VARIABLE: "1"}
    if args.threads is not None:
        environment["OMP_NUM_THREADS"] = str(args.threads)
    stdout = sys.stderr if args.json else None
    status = subprocess.run(line, env=environment, stdout=stdout, check=False).returncode
    if args.tool == "nsys":
        return {"status": status, "line": line, "timeline": "nsys.nsys-rep"}
    written = folder / "ncu.csv"
    kernels = ncu.read(written.read_text("utf-8", "replace")) if written.exists() else []
    return {"status": status, "line": line, "kernels": kernels}


def _print(args: argparse.Namespace, report: Result, out: OutFile) -> None:
    from fused_dni.report import as_text, blocks_of
    from fused_dni.report.files import as_json

    if args.json:
        say(as_json(report).rstrip())
    elif not args.quiet:
        say(f"\n{as_text(blocks_of(report))}")
        if out.written is not None:
            say(f"\n{out.written}")
