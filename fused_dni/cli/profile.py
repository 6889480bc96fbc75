"""``profile``."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_dni.cli.arguments import refuse_unwritable
from fused_dni.cli.command import PROGRAM, Measuring, UsageError
from fused_dni.cli.output import OutFile, refuse_foreign, say, warn
from fused_dni.measure.options import FOLDER, SECONDS, TEXT, one_of, option, whole

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


@dataclass(kw_only=True)
class Profile(Measuring):
    """Run a command under a profiler, with ranges named after layer and phase: nsys for a timeline
    of launches, ncu for a table of kernels against the GPU's ceilings, torch for a trace and a
    table by range and op, which needs no GPU. The command's exit status is passed on."""

    name = "profile"
    summary = "run a command under Nsight Systems, Nsight Compute or torch.profiler"
    usage = f"{PROGRAM} profile {{nsys,ncu,torch}} [options] -- COMMAND ..."
    epilog = """examples:
  {program} profile torch -- python train.py --epochs 1
  {program} profile nsys -- {program} train --epochs 1
  {program} profile ncu --range 'blocks.3: step' -- python train.py
  {program} report runs/profile/profile.json -o profile.html"""

    tool: str = option(MISSING, one_of(("nsys", "ncu", "torch")), "the profiler", place=True)
    seconds: float | None = option(
        None, SECONDS, "torch: of recording, from the first call of a module (5)",
        group="what is recorded",
    )  # fmt: skip
    range: str | None = option(
        None, TEXT, "nsys: the first range of this name alone; ncu: launches in such ranges alone"
    )
    kernels: str | None = option(
        None, TEXT, "ncu: names of kernels, as NAME or regex:PATTERN (our own)"
    )
    skip: int | None = option(None, whole(0), "ncu: launches (0)")
    count: int | None = option(None, whole(1), "ncu: launches (50)")
    out: str = option("runs/profile", FOLDER, "where profile.json goes, too", group="output")
    json: bool = option(
        False, help="the report as JSON on stdout; what the command prints goes to stderr"
    )
    quiet: bool = option(False, help="neither the command line nor the table")

    def run(self, command: str) -> int:
        words = self.behind
        if not words:
            raise UsageError(
                f"what is to be profiled? {PROGRAM} profile {self.tool} -- COMMAND ..."
            )
        for name, tools in BELONGS.items():
            if getattr(self, name) is not None and self.tool not in tools:
                raise UsageError(
                    f"--{name} does not go with {self.tool}, but with {' and '.join(tools)}"
                )
        body: dict[str, Any] = {"tool": self.tool, "profiled": words}
        folder = Path(self.out)
        refuse_foreign("--out", folder / "profile.json", self.name)
        made = self._in_this_process(folder) if self.tool == "torch" else self._by_nsight(folder)
        if made is None:
            return 1
        from fused_dni.measure.baseline import facts
        from fused_dni.report.files import as_json
        from fused_dni.report.schema import Result

        report = Result("profile", facts=facts(command), body={**body, **made})
        out = OutFile("--out", str(folder / "profile.json"))
        out.write(as_json(report))
        self._print(report, out)
        out.finish()
        return int(report["status"])

    def _in_this_process(self, folder: Path) -> dict[str, Any]:
        from fused_dni.measure.profile import trace
        from fused_dni.measure.profile.command import InProcess

        profiled = InProcess(self.behind)
        refuse_unwritable(self.out)
        aside = contextlib.redirect_stdout(sys.stderr) if self.json else contextlib.nullcontext()
        file = folder / "trace.json.gz"
        with aside:
            status, found = trace.record(profiled.run, file, self.seconds or 5.0)
        return {"status": status, "trace": file.name, **found}

    def _by_nsight(self, folder: Path) -> dict[str, Any] | None:
        """Make the report's part; None, and a line that says why, if there is no such tool."""
        from fused_dni.annotate import VARIABLE
        from fused_dni.measure.profile import ncu, nsys
        from fused_dni.measure.profile.command import as_process

        profiled = as_process(self.behind)
        refuse_unwritable(self.out)
        if self.tool == "nsys":
            line = nsys.line(profiled, folder, self.range)
        else:
            line = ncu.line(
                profiled,
                folder,
                only=self.range,
                kernels=self.kernels or ncu.OURS,
                skip=self.skip or 0,
                count=self.count or 50,
            )
        tool = nsys if self.tool == "nsys" else ncu
        missing = shutil.which(self.tool) is None
        if missing or not self.quiet:
            warn(f"{VARIABLE}=1 {shlex.join(line)}")
        if missing:
            warn(f"{PROGRAM}: error: {tool.MISSING}")
            return None
        environment = {**os.environ, VARIABLE: "1"}
        if self.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        stdout = sys.stderr if self.json else None
        status = subprocess.run(line, env=environment, stdout=stdout, check=False).returncode
        if self.tool == "nsys":
            return {"status": status, "line": line, "timeline": "nsys.nsys-rep"}
        written = folder / "ncu.csv"
        kernels = ncu.read(written.read_text("utf-8", "replace")) if written.exists() else []
        return {"status": status, "line": line, "kernels": kernels}

    def _print(self, report: Result, out: OutFile) -> None:
        from fused_dni.report import as_text, blocks_of
        from fused_dni.report.files import as_json

        if self.json:
            say(as_json(report).rstrip())
        elif not self.quiet:
            say(f"\n{as_text(blocks_of(report))}")
            if out.written is not None:
                say(f"\n{out.written}")
