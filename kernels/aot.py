"""Kernels compiled ahead of time, for a GPU that is not there, and what their machine code shows.

    python -m fused_dni.kernels.aot --arch 90

compiles all launches of :mod:`fused_dni.kernels.specimens`, prints for each the
registers and the stack of a thread, the shared memory of a block, which tensor-core instructions
it has and how many of its loads from global memory are 128 bits wide, and says which of the bounds
that a :class:`fused_dni.kernels.launch.Specimen` states are broken.

Types, constants and alignments are derived by Triton's own just-in-time compiler, which is told
that a device of that architecture is there: what is looked at is what would run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from fused_dni.kernels.launch import Launch, Specimen
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

# What a block may have: KiB of shared memory by architecture (CUDA C++ Programming Guide, table
# "Technical Specifications per Compute Capability"), columns of Blackwell's tensor memory.
SHARED = {80: 163, 90: 227, 100: 227}
TENSOR_MEMORY = 512


class MachineCode(NamedTuple):
    """What is read off a compiled kernel."""

    registers: int  # of a thread
    stack: int  # bytes of a thread: registers that went through memory
    shared: int  # bytes of a block
    tensor_memory: int  # columns of a block
    tensor_cores: tuple[str, ...]  # "mma", "wgmma", "tcgen05"
    wide_loads: int  # instructions that load 128 bits or more from global memory at a time
    loads: int  # all instructions that load from global memory
    barriers: int  # waits of kernels.common.grid_barrier
    sound_barriers: int  # those with everything in its place
    in_flight: int  # loads that are on their way when a barrier begins; of all, the fewest
    hash: str  # Triton's key of this very kernel


# ---------------------------------------------------------------------------------------------
# One kernel


class _Absent:
    """A device that is not there, as far as a compiler asks for it."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        # A kernel keeps what was compiled by the number of the device.
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


def compile_launch(launch: Launch, architecture: int) -> Any:
    """Compile a launch for an architecture (90 for compute capability 9.0) and run nothing.

    Tensors among the arguments may be of any device, "meta" as well. From here on this *process*
    has no other GPU than that one as far as Triton is concerned.

    Returns:
        Triton's CompiledKernel.

    Raises:
        RuntimeError: Triton's interpreter is on.
    """
    if knobs.runtime.interpret:
        raise RuntimeError(
            "Triton's interpreter is on, under which nothing can be compiled: unset "
            "TRITON_INTERPRET and start again"
        )
    driver.set_active(_Absent(architecture))
    return launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)


_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_TENSOR_CORES = {
    "mma": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
}
# Plain loads, asynchronous copies to shared memory, and the copy engine's (TMA).
_LOAD = re.compile(r"\bld\.global\b|\bcp\.async\.c[ag]\.|\bcp\.async\.bulk\.\S*shared\S*\.global")
_WIDE = re.compile(
    r"\bld\.global\S*\.(v4\.[bfsu](32|64)|v2\.[bfsu]64|v8\.[bfsu]32|b128)\b"
    r"|\bcp\.async\.cg\.[^;]*, (0x10|16)\b"
    r"|\bcp\.async\.bulk\."
)
# What the order of a grid barrier is about: the block's barriers and accesses to global memory.
_ORDERED = re.compile(
    r"\b(?P<block>bar(rier)?\.sync)\b"
    r"|\b(?P<arrive>atom\.global\.gpu\.acq_rel\.add\.u32)\b"
    r"|\b(?P<wait>ld\.global\.gpu\.acquire\.b32|ld\.acquire\.gpu\.global\.b32)\b"
    r"|\b(?P<give_up>atom\.global\.\S*cas\.b32)\b"
    r"|\b(?P<access>(ld|st|atom|red)\.global|cp\.async)\b"
)
_FLOW = re.compile(
    r"^(?P<label>\$\w+):|(?P<guard>@\S+\s+)?\bbra(\.uni)?\s+(?P<to>\$\w+)|\b(?P<end>ret|exit);"
)
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?(?P<name>[A-Z]\S*)(?P<operands>.*?);")
_REGISTER = re.compile(r"(?P<address>\[)?\bR(?P<first>\d+)\b(?P<pair>\.64)?")


def read(compiled: Any) -> MachineCode:
    """Read off a CompiledKernel what :class:`MachineCode` holds."""
    ptx, cubin, metadata = compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata
    registers, stack, local = _resources(cubin)
    barriers, sound = grid_barriers(ptx)
    loads = [line for line in ptx.splitlines() if _LOAD.search(line)]
    return MachineCode(
        registers,
        stack + local,
        # All of it dynamic. What cuobjdump calls SHARED is the KiB that Hopper and newer ones keep
        # for themselves, which is not in the limits above either.
        metadata.shared,
        getattr(metadata, "tmem_size", None) or 0,
        tuple(name for name, pattern in _TENSOR_CORES.items() if re.search(pattern, ptx)),
        sum(_WIDE.search(line) is not None for line in loads),
        len(loads),
        barriers,
        sound,
        in_flight(_cuobjdump("--dump-sass", cubin)) if barriers else 0,
        metadata.hash,
    )


def _cuobjdump(what: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """Return registers, stack and static local memory of a thread."""
    report = _cuobjdump("--dump-resource-usage", cubin)
    found = _RESOURCES.search(report)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {report!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack, local


def grid_barriers(ptx: str) -> tuple[int, int]:
    """Count how many waits of a grid barrier there are, and how many of them are sound.

    One thread arrives and waits for its block. So on every path: the block's barrier, to collect
    what the other threads wrote; the arrival, which releases it; the acquiring load, with nothing
    but the block's barriers and the giving up in between; the block's barrier again, before anybody
    reads.
    """
    kinds: list[str | None] = ["entry"]  # of the lines that matter; None: of the control flow
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    falls = [True]  # whether the next line can follow
    for line in ptx.splitlines():
        flow, ordered = _FLOW.search(line), _ORDERED.search(line)
        if flow is None and ordered is None:
            continue
        kinds.append(None if ordered is None else ordered.lastgroup)
        falls.append(True)
        if flow is not None and flow["label"]:
            labels[flow["label"]] = len(kinds) - 1
        elif flow is not None:
            falls[-1] = bool(flow["guard"])
            if flow["to"]:
                jumps.append((len(kinds) - 1, flow["to"]))
    forth: list[list[int]] = [[i + 1] if fall else [] for i, fall in enumerate(falls)]
    forth[-1:] = [[]]
    for i, label in jumps:
        forth[i].append(labels[label])
    back: list[list[int]] = [[] for _ in kinds]
    for i, following in enumerate(forth):
        for j in following:
            back[j].append(i)

    def nearest(start: int, near: list[list[int]], through: tuple[str, ...]) -> set[int]:
        """Find the first lines of other kinds than these on all paths from a line."""
        seen: set[int] = set()
        found: set[int] = set()
        todo = list(near[start])
        while todo:
            i = todo.pop()
            if i in seen:
                continue
            seen.add(i)
            if kinds[i] is None or kinds[i] in through or i == start:
                todo += near[i]
            else:
                found.add(i)
        return found

    def all_are(kind: str, lines: set[int]) -> bool:
        return bool(lines) and all(kinds[i] == kind for i in lines)

    waits = [i for i, kind in enumerate(kinds) if kind == "wait"]
    sound = 0
    for i in waits:
        arrivals = nearest(i, back, ("block", "give_up"))
        sound += (
            all_are("arrive", arrivals)
            and all(all_are("block", nearest(j, back, ())) for j in arrivals)
            and all_are("block", nearest(i, forth, ()))
        )
    return len(waits), sound


def in_flight(sass: str) -> int:
    """Count how many loads from global memory are on their way when a grid barrier's fence begins:
    asked for in front of it in the order of the text, and not looked at. Of several barriers the
    fewest."""
    waiting: dict[int, range] = {}  # by the first register of what was asked for: all of them
    counts = []
    for line in sass.splitlines():
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        name, operands = found["name"], list(_REGISTER.finditer(found["operands"]))
        width = (
            4 if ".128" in name or "MMA" in name else 2 if ".64" in name or name[0] == "D" else 1
        )
        for operand in operands:
            first, address = int(operand["first"]), operand["address"] or operand["pair"]
            count = (2 if operand["pair"] else 1) if address else width
            for load, registers in list(waiting.items()):
                if registers.start < first + count and first < registers.stop:
                    del waiting[load]
        if name.startswith("LDG") and ".STRONG" not in name and operands:
            first = int(operands[0]["first"])
            waiting[first] = range(first, first + width)
        if name.startswith("MEMBAR"):
            counts.append(len(waiting))
    return min(counts, default=0)


def broken_bounds(specimen: Specimen, code: MachineCode, architecture: int) -> list[str]:
    """Say which bounds a specimen's machine code does not keep to, in words; nothing is good."""
    found = []
    if code.stack > specimen.spills:
        found.append(f"spills {code.stack} bytes a thread, allowed are {specimen.spills}")
    if code.shared > SHARED[architecture] * 1024:
        found.append(f"shared memory {code.shared} bytes, a block has {SHARED[architecture]} KiB")
    if code.tensor_memory > TENSOR_MEMORY:
        found.append(f"tensor memory {code.tensor_memory} columns, there are {TENSOR_MEMORY}")
    if specimen.tensor_cores and not code.tensor_cores:
        found.append("no tensor-core instruction")
    if specimen.wide_loads and not code.wide_loads:
        found.append("no 128-bit load from global memory")
    if code.in_flight < specimen.in_flight:
        found.append(
            f"{code.in_flight} loads in flight at a barrier, there have to be {specimen.in_flight}"
        )
    if code.sound_barriers < code.barriers:
        found.append(f"{code.barriers - code.sound_barriers} grid barriers out of order")
    if code.barriers and not specimen.launch.options.get("launch_cooperative_grid", False):
        found.append("grid barrier in a launch that is not cooperative")
    return found


# ---------------------------------------------------------------------------------------------
# All of them


class Outcome(NamedTuple):
    """What became of one specimen."""

    kernel: str
    specimen: str
    options: dict[str, Any]
    code: MachineCode | None  # None: it could not be compiled
    broken: list[str]

    def row(self) -> list[str]:
        """Return the cells of the table."""
        how = [f"{self.options.get('num_warps', 4)}w {self.options.get('num_stages', 3)}s"]
        if self.options.get("launch_cooperative_grid", False):
            how.append("cooperative")
        cells = [f"{self.kernel}: {self.specimen}", " ".join(how)]
        if self.code is None:
            cells += ["-"] * 6
        else:
            code = self.code
            cells += [
                str(code.registers),
                str(code.stack),
                f"{code.shared / 1024:.1f}",
                "+".join(code.tensor_cores) or "-",
                f"{code.wide_loads}/{code.loads}",
                str(code.barriers),
            ]
        return [*cells, "broken" if self.broken else "ok"]


HEADER = [
    "kernel: specimen", "launch", "registers", "stack B", "shared KiB", "tensor cores",
    "wide loads", "barriers", "bounds",
]  # fmt: skip


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a line for each outcome, and below it what is broken."""
    rows = [HEADER, *(outcome.row() for outcome in outcomes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    form = "  ".join(f"{{:{'>' if i else '<'}{width}}}" for i, width in enumerate(widths))
    lines = [form.format(*row).rstrip() for row in rows]
    lines += [f"{o.kernel}: {o.specimen}: {'; '.join(o.broken)}" for o in outcomes if o.broken]
    return "\n".join(lines)


def find_specimens(modules: Sequence[str], architecture: int, match: str) -> list[Specimen]:
    """Find the specimens of these modules (of :mod:`fused_dni.kernels.specimens`, if none is named)
    in whose name behind their kernel's (``"kernel: name"``) the regular expression ``match`` is."""
    found: list[Specimen] = []
    for module in modules or ("fused_dni.kernels.specimens",):
        found += importlib.import_module(module).specimens(architecture)
    return [s for s in found if re.search(match, f"{s.launch.kernel.__name__}: {s.name}")]


# What the workers find when they are forked: launches hold functions that cannot be sent to them.
_specimens: list[Specimen] = []


def _quiet() -> None:
    """Silence stderr: a compiler that fails prints whole programs, of which its message is
    enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _examine(index: int, architecture: int) -> Outcome:
    """Compile one specimen. Whatever is wrong with it is its outcome."""
    specimen = _specimens[index]
    code, broken = None, []
    try:
        code = read(compile_launch(specimen.launch, architecture))
        broken = broken_bounds(specimen, code, architecture)
    except Exception as error:
        broken = [f"not compiled: {_reason(error)}"]
    return _outcome(specimen, code, broken)


def _outcome(specimen: Specimen, code: MachineCode | None, broken: list[str]) -> Outcome:
    launch = specimen.launch
    return Outcome(launch.kernel.__name__, specimen.name, launch.options, code, broken)


def _reason(error: BaseException) -> str:
    """Return the innermost cause in one line. Triton's errors quote the source down to the line
    that is wrong, mark the place in it, and end with what is wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"
    return f"{message}, in: {lines[lines.index('^') - 1]}" if "^" in lines[1:] else message


def examine(specimens: list[Specimen], architecture: int, jobs: int) -> Iterator[Outcome]:
    """Compile all, ``jobs`` at a time, each in a process that was forked from this one. Outcomes
    come as they are ready; a compiler that crashes is one of them."""
    _specimens[:] = specimens
    fork = multiprocessing.get_context("fork")

    def pool(workers: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(workers, mp_context=fork, initializer=_quiet)

    alone = []  # they were under way when a worker died
    with pool(jobs) as workers:
        futures: dict[Future[Outcome], int] = {
            workers.submit(_examine, i, architecture): i for i in range(len(specimens))
        }
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenProcessPool:
                alone.append(futures[future])
    for i in alone:
        with pool(1) as worker:
            try:
                yield worker.submit(_examine, i, architecture).result()
            except BrokenProcessPool:
                yield _outcome(specimens[i], None, ["not compiled: the compiler crashed"])


def _counted(outcomes: Iterator[Outcome], total: int, name: str) -> Iterator[Outcome]:
    """Yield the outcomes, and count them on stderr: a bar on a terminal, elsewhere a line
    every ten seconds and one at the end."""
    terminal = sys.stderr.isatty()
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        auto_refresh=False,  # by a thread, beside which workers would be forked
        disable=not terminal,
    )
    last = time.monotonic()
    with bars:
        task = bars.add_task(name, total=total, note="")
        for count, outcome in enumerate(outcomes, 1):
            bars.update(task, completed=count, note=outcome.specimen, refresh=True)
            if not terminal and (count == total or time.monotonic() - last >= 10.0):
                last = time.monotonic()
                said = f"{name}: {100 * count / total:.0f} %  {outcome.specimen}"
                print(said, file=sys.stderr, flush=True)
            yield outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Exit codes: 0; 1 a bound is broken; 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m fused_dni.kernels.aot",
        description="Compile the kernels' specimens for a GPU that need not be there, and check "
        "what their machine code shows.",
    )
    parser.add_argument("modules", nargs="*", help="modules with specimens; default: all kernels")
    parser.add_argument("--arch", type=int, choices=SHARED, required=True, help="90 for sm_90")
    parser.add_argument(
        "--match", default="", metavar="REGEX", help="those whose name it is found in"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes there too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    given = parser.parse_args(arguments)
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, under which nothing can be compiled: unset it")
    try:
        specimens = find_specimens(given.modules, given.arch, given.match)
    except ModuleNotFoundError as error:
        parser.error(str(error))
    if not specimens:
        parser.error(f"{given.match!r} is found in no specimen's name")
    ready = examine(specimens, given.arch, max(given.jobs, 1))
    outcomes = list(_counted(ready, len(specimens), f"sm_{given.arch}"))
    order = [(s.launch.kernel.__name__, s.name) for s in specimens]
    outcomes.sort(key=lambda outcome: order.index(outcome[:2]))
    print(table(outcomes))
    if given.json is not None:
        rows = [o._asdict() | {"code": o.code and o.code._asdict()} for o in outcomes]
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    broken = sum(bool(outcome.broken) for outcome in outcomes)
    if broken:
        print(f"{broken} of {len(outcomes)} specimens break a bound", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
