"""``compare``: two files of results against each other."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path

from fused_dni.cli.command import PROGRAM, Printing
from fused_dni.cli.output import out_file, say
from fused_dni.measure.options import FILE, number, option


@dataclass(kw_only=True)
class Compare(Printing):
    """Compare two files by `pytest bench --benchmark-json`, or two reports of one kind, benchmark
    by benchmark. Two runs are not interleaved: differences within what the benchmarks' own floors
    changed by are inconclusive."""

    name = "compare"
    kind = "comparison"
    summary = "two files of results: what became faster, what slower, what cannot be told"
    epilog = "example: {program} compare before.json after.json --fail-on-slower"

    old: str = option(MISSING, FILE, "what was", place=True)
    new: str = option(MISSING, FILE, "what is", place=True)
    noise: float | None = option(
        None, number(), "what the same code changes by between two runs (as the floors did)"
    )
    force: bool = option(False, help="even if machines, versions or settings differ")
    fail_on_slower: bool = option(False, help="exit status 1 if anything is slower")

    def check(self) -> None:
        from fused_dni.report.times import read

        for name in (self.old, self.new):
            read(name)

    def run(self, command: str) -> int:
        from fused_dni.measure.compare import blocks, compare, read
        from fused_dni.report import as_text
        from fused_dni.report.files import as_json

        out = out_file(self)
        names = Path(self.old).name, Path(self.new).name  # without the reader's folders
        found = compare(
            read(self.old),
            read(self.new),
            noise=self.noise,
            force=self.force,
            command=f"{PROGRAM} compare {' '.join(names)}",
        )
        out.write(as_json(found))
        say(as_json(found) if self.json else as_text(blocks(found)), end="" if self.json else "\n")
        out.finish()
        slower = any(row["verdict"] == "slower" for row in found["rows"])
        return 1 if slower and self.fail_on_slower else 0
