"""The two calls of bench/gpu.sh: their parts, the time that each has, and what is kept when.

    python bench/gpu_run.py [first|second] OUT [SECONDS]

Needs the standard library alone; what it starts needs torch. Each part is a process of its own with
a share of the time: of what is left, as much as its share of those that are still to come. It is
stopped, with all that it started, at its limit, and the rest is done. Before and after each part
run.json and summary.txt are written anew; results are written by the parts, figure by figure.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
USAGE = "usage: bench/gpu.sh [first|second] OUT [SECONDS]"

#: Seconds of a call; together they leave three of fifteen minutes to whoever starts a machine.
CALLS = {"first": 240.0, "second": 480.0}
#: All that a run leaves. (A ninth would be more than some machines give back; one is left for what
#: is being written when a run is killed.)
FILES = (
    *("run.json", "summary.txt", "log.txt", "kernels.json"),
    *("verdict.json", "map.json", "rivals.json"),
)
#: Exit status of gpu_kernels.py: a kernel left the device unusable to that process.
LOST = 4
#: Seconds between asking a process to end and making it.
GRACE = 10.0
#: Lines of a part that the summary has at most.
SAID = 20
#: For tools under which kernels are so slow that they would seem to hang.
PATIENT = {"FUSED_DNI_SPIN_BOUND": "0"}
#: Shapes that are measured first, the most promising of each kind.
KEYS = (
    *("128/1024 bf16 sgd", "64/256 bf16 sgd"),
    *("16/768/1024 bf16", "16/256/128 bf16", "64/640/128 bf16"),
)


class LeftOut(Exception):
    """Why a part is not started, in one line."""


class Ended(NamedTuple):
    """How a process ended: its exit status, None if it was stopped, and how long it took."""

    status: int | None
    seconds: float


def _apart() -> None:
    """In a new process: its own group, and deaf to Ctrl-C no longer, which a shell makes of what it
    starts in the background."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Machine:
    """The clock, and processes. (Tests have another.)"""

    def now(self) -> float:
        return time.monotonic()

    def which(self, name: str) -> str | None:
        """Return a program's path: on PATH or with CUDA's."""
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        return shutil.which(name) or shutil.which(name, path=f"{home}/bin")

    def run(
        self,
        command: list[str],
        environment: Mapping[str, str],
        log: Path,
        limit: float,
        interrupt: bool = False,
    ) -> Ended:
        """Run to the end or the limit, output behind the log's. Shortly before the limit the
        process is asked to end: by Ctrl-C (``interrupt``), which it alone gets, or else with all of
        its group. Nothing of that group is left behind."""
        start = self.now()
        with open(log, "ab") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=_apart,
            )
        grace = min(GRACE, limit / 4)
        stopped = False
        try:
            try:
                process.wait(limit - grace)
            except subprocess.TimeoutExpired:
                stopped = True
                if interrupt:
                    process.send_signal(signal.SIGINT)
                else:
                    os.killpg(process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(grace)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return Ended(None if stopped else process.returncode, self.now() - start)


class Part(NamedTuple):
    """One process of a call.

    Attributes:
        share: its part of the call's time, as seconds of a call of the usual length.
        least: seconds below which it is not worth starting.
        command: makes the command line, given the run and the part's limit; raises
            :class:`LeftOut`.
        stretch: the limit, in shares.
        interrupt: whether it is stopped by Ctrl-C.
        environment: more variables for it.
        said: the lines of its output that belong into the summary.
    """

    name: str
    share: float
    least: float
    command: Callable[[Run, float], list[str]]
    stretch: float = 1.0
    interrupt: bool = False
    environment: Mapping[str, str] = {}
    said: str = r"(?!)"


class Run:
    """What the parts of a run share: where, until when, and the record of it."""

    def __init__(
        self, machine: Machine, environ: Mapping[str, str], work: Path, root: Path = ROOT
    ) -> None:
        self.machine, self.work, self.root = machine, work, root
        self.python = sys.executable
        self.facts: dict[str, Any] = {}
        self.commit = commit(root, environ)
        self.prebuilt = environ.get("PREBUILT")
        self.wanted = environ.get("ONLY", "").split()
        self.record: dict[str, Any] = {}
        self.notes: list[str] = []
        self.out = work
        site = work / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(FINDER.format(root=str(root)), encoding="utf-8")
        paths = [str(site), str(root), environ.get("PYTHONPATH", "")]
        nvcc = machine.which("nvcc")
        self.environment = {
            "TRITON_CACHE_DIR": str(root / "build" / "triton"),
            **environ,
            "PATH": os.pathsep.join(
                [environ.get("PATH", os.defpath), *([str(Path(nvcc).parent)] if nvcc else [])]
            ),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "FUSED_DNI_CACHE": str(work / "tiles"),  # not what this user may have tuned before
            **({} if self.commit is None else {"FUSED_DNI_COMMIT": self.commit}),
        }

    # ---- What there is -----------------------------------------------------------------------

    def probe(self) -> tuple[int, str]:
        """Ask for the device's facts; 0, or an exit status and why there is nothing to be done."""
        file, log = self.work / "facts.json", self.work / "probe.log"
        command = [self.python, self.script("gpu_baselines"), str(file), "--part", "device"]
        ended = self.machine.run(command, self.environment, log, 90.0)
        last = (said_in(log).strip().splitlines() or ["it says nothing"])[-1]
        if ended.status == 0:
            self.facts = json.loads(file.read_text(encoding="utf-8"))["baselines"]["device"]
            return 0, ""
        if ended.status == 3:
            return 3, f"{last}, nothing to measure"
        if "No module named 'torch'" in last:
            return 2, f"{self.python} cannot import torch (set PYTHON to an interpreter that can)"
        if ended.status is None:
            last = f"it was stopped after {ended.seconds:.0f} s"
        return 2, f"the GPU was asked for in vain: {last}"

    def look(self) -> None:
        """Note what will be missing, a line each, and choose what nvcc compiles for."""
        major, minor = self.capability()
        suited = f"{major}{minor}" + "a" * (major == 9)
        asked = self.environment.get("FUSED_DNI_CUDA_ARCHS", "").strip().lower()
        self.environment["FUSED_DNI_CUDA_ARCHS"] = asked or suited
        if (major, minor) < (8, 0):
            self.note(f"compute capability {major}.{minor}: our kernels need 8.0; the rest is done")
        elif asked not in ("", "all", "none") and not serves(asked, major, minor):
            self.note(
                f"FUSED_DNI_CUDA_ARCHS={asked} has no code for this GPU, {major}.{minor}: its rows "
                "will hold that reason; the rest is done"
            )
        if self.commit is None:
            self.note(
                "no .git: the results name no commit (FUSED_DNI_COMMIT=..., or a file COMMIT)"
            )
        nvcc = self.machine.which("nvcc")
        if nvcc is None:
            return
        log = self.work / "nvcc.log"
        self.machine.run([nvcc, "--version"], self.environment, log, 20.0)
        release = re.search(r"release (\d+)\.(\d+)", said_in(log))
        driver = str(self.facts.get("driver_cuda") or "")
        if release and driver and int(release[1]) > int(driver.partition(".")[0]):
            self.note(
                f"the driver {self.facts.get('driver')} is for CUDA {driver}, nvcc is of "
                f"{release[1]}.{release[2]}: what it builds does not start; the rest is done"
            )

    def capability(self) -> tuple[int, int]:
        """Return the GPU's."""
        major, minor = str(self.facts["capability"]).split(".")
        return int(major), int(minor)

    def note(self, text: str) -> None:
        """Say it, and keep it for the summary."""
        self.notes.append(text)
        print(f"bench/gpu.sh: {text}", file=sys.stderr, flush=True)

    # ---- Where results go --------------------------------------------------------------------

    def settle(self, out: Path, calls: list[str]) -> None:
        """Take a folder for the results: OUT, if it is empty or holds this commit's figures of this
        device, else a new one in it, and a temporary one where nothing can be written."""
        self.out, before = out, {}
        try:
            out.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(ValueError, FileNotFoundError):
                before = json.loads((out / "run.json").read_text(encoding="utf-8"))
        except OSError as error:
            self.move(error)
        known = {key: before.get("environment", {}).get(key) for key in ("name", "driver")}
        ours = {key: self.facts.get(key) for key in ("name", "driver")}
        belongs = self.commit is not None and before.get("commit") == self.commit and known == ours
        if belongs:
            self.record = before
        elif any((self.out / name).exists() for name in FILES):
            number = 2
            while (out / f"run-{number}").exists():
                number += 1
            self.out = out / f"run-{number}"
            self.note(
                f"{out} holds files of another run (commit {before.get('commit')}, "
                f"{known['name']}): this one writes into {self.out}"
            )
            with contextlib.suppress(OSError):
                self.out.mkdir()
        self.record = {
            "kind": "gpu run",
            "version": 1,
            "parts": [],
            "tuned": {},
            **self.record,
            "commit": self.commit,
            "environment": self.facts,
            "calls": list(dict.fromkeys([*self.record.get("calls", []), *calls])),
        }

    def move(self, error: OSError) -> None:
        """Go on in a temporary folder, with what was found so far."""
        old, self.out = self.out, Path(tempfile.mkdtemp(prefix="gpu-run-"))
        for name in FILES:
            with contextlib.suppress(OSError):
                shutil.copy(old / name, self.out / name)
        self.note(f"{old}: {error.strerror}: results are in {self.out}")

    def room(self) -> None:
        """See that there is room for a part's results, or move."""
        trial = self.out / "room.partial"
        try:
            for partial in self.out.glob("*.part*"):  # of what was stopped while it wrote
                partial.unlink()
            trial.write_bytes(bytes(2**18))
            trial.unlink()
        except OSError as error:
            with contextlib.suppress(OSError):
                trial.unlink()
            self.move(error)

    def save(self) -> None:
        """run.json and summary.txt, each whole or as it was."""
        self.record["notes"] = self.notes
        texts = {"run.json": json.dumps(self.record, indent=1) + "\n", "summary.txt": summary(self)}
        for name, text in texts.items():
            try:
                write(self.out / name, text)
            except OSError as error:
                self.move(error)
                with contextlib.suppress(OSError):
                    write(self.out / name, text)

    # ---- Parts -------------------------------------------------------------------------------

    def script(self, name: str) -> str:
        return str(self.root / "bench" / f"{name}.py")

    def tool(self, name: str) -> str:
        """Return a program's path.

        Raises:
            LeftOut: there is none.
        """
        found = self.machine.which(name)
        if found is None:
            raise LeftOut(f"no {name} on PATH, in CUDA_HOME or in /usr/local/cuda")
        return found

    def built(self) -> bool:
        """Say whether there is a CUDA part, of this source or an older one."""
        return any((self.root / "fused_dni" / "backends").glob("_cuda*.so"))

    def call(self, name: str, parts: tuple[Part, ...], end: float) -> None:
        """Run the parts, one after the other."""
        chosen = [part for part in parts if not self.wanted or part.name in self.wanted]
        for index, part in enumerate(chosen):
            left = end - self.machine.now()
            shares = sum(later.share for later in chosen[index:])
            limit = min(left, part.stretch * left * part.share / shares)
            self.part(name, part, limit)

    def part(self, call: str, part: Part, limit: float) -> None:
        """One part, noted before and after."""
        self.room()
        entry: dict[str, Any] = {"call": call, "name": part.name, "limit": round(limit, 1)}
        kept = [e for e in self.record["parts"] if (e["call"], e["name"]) != (call, part.name)]
        self.record["parts"] = [*kept, entry]
        try:
            if limit < part.least:
                raise LeftOut(f"no time: {limit:.0f} s are left for it, it needs {part.least:g}")
            command = part.command(self, limit)
        except LeftOut as reason:
            self.record["parts"][-1] |= {"status": "left out", "why": str(reason)}
            print(f"bench/gpu.sh: {part.name} is left out: {reason}", file=sys.stderr, flush=True)
            self.save()
            return
        entry["status"] = "running"
        self.save()
        entry |= self.process(part, command, limit)
        tuned = self.work / "tiles"
        for path in sorted(tuned.glob("*.json")) if tuned.is_dir() else ():
            with contextlib.suppress(ValueError):
                self.record["tuned"][path.stem] = json.loads(path.read_text(encoding="utf-8"))
        self.save()

    def process(self, part: Part, command: list[str], limit: float) -> dict[str, Any]:
        """Run a part's command, again behind a kernel that took the device with it."""
        start = self.machine.now()
        log = self.out / "log.txt"
        environment = {**self.environment, **part.environment}
        said: list[str] = []
        while True:
            offset = log.stat().st_size if log.exists() else 0
            left = limit - (self.machine.now() - start)
            try:
                with open(log, "a", encoding="utf-8") as output:
                    output.write(f"==== {part.name}: {' '.join(command)}\n")
                ended = self.machine.run(command, environment, log, left, part.interrupt)
                with open(log, "rb") as output:
                    output.seek(offset)
                    lines = output.read().decode(errors="replace").splitlines()[1:]
            except OSError as error:
                reason = f"{part.name} was not started: {error.strerror}"
                return {"status": "failed", "why": reason, "seconds": 0.0, "said": said}
            said += [line.strip() for line in lines if re.search(part.said, line)][-SAID:]
            left = limit - (self.machine.now() - start)
            if ended.status != LOST or left < part.least:
                break
            said.append(f"{part.name}: {lines[-1] if lines else 'the device was lost'}")
            command = [*command, *(["--resume"] if "--resume" not in command else [])]
        found: dict[str, Any] = {"seconds": round(self.machine.now() - start, 1), "said": said}
        if ended.status == 0:
            return found | {"status": "done"}
        if ended.status is None:
            return found | {"status": "stopped", "why": f"stopped after {ended.seconds:.0f} s"}
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return found | {"status": "failed", "why": f"exit status {ended.status}: {last[:200]}"}


#: What an editable installation does, without one: ``fused_dni.kernels`` lies in ``kernels/``.
FINDER = """\
import sys
from importlib.util import spec_from_file_location


class Kernels:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "fused_dni.kernels":
            return None
        folder = {root!r} + "/kernels"
        return spec_from_file_location(
            name, folder + "/__init__.py", submodule_search_locations=[folder]
        )


sys.meta_path.insert(0, Kernels)
"""


def commit(root: Path, environ: Mapping[str, str]) -> str | None:
    """Say what the results are of: git's word, where there is no git that of FUSED_DNI_COMMIT, or
    of the file COMMIT."""
    if (root / ".git").exists():
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(
                command, cwd=root, capture_output=True, encoding="utf-8", timeout=20, check=True
            ).stdout.strip()
    if environ.get("FUSED_DNI_COMMIT"):
        return environ["FUSED_DNI_COMMIT"]
    with contextlib.suppress(OSError):
        return (root / "COMMIT").read_text(encoding="utf-8").split()[0]
    return None


def serves(architectures: str, major: int, minor: int) -> bool:
    """Say whether code for one of these runs on that compute capability (80 on 8.6, 90a on 9.0)."""
    for name in re.split(r"[;,\s]+", architectures):
        number = int(re.sub(r"\D", "", name) or 0)
        if divmod(number, 10) == (major, minor):
            return True
        if name.isdigit() and number // 10 == major and number % 10 <= minor:
            return True
    return False


def said_in(log: Path) -> str:
    """Read what a process has printed; "" where it never began."""
    return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""


def write(path: Path, text: str) -> None:
    """Written whole and moved into place: a kill leaves the old one."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


# ---------------------------------------------------------------------------------------- parts


def build(run: Run, limit: float) -> list[str]:
    """Build the CUDA part, for this GPU alone; or what was built elsewhere for this interpreter."""
    if run.prebuilt:
        found = sorted(Path(run.prebuilt).glob(f"_*{run.facts.get('extensions')}"))
        for path in found:
            shutil.copy(path, run.root / "fused_dni" / "backends" / path.name)
        if any(path.name.startswith("_cuda.") for path in found):
            return [run.python, "-c", "import fused_dni.backends._cuda as m; print(m.__file__)"]
        run.note(f"PREBUILT={run.prebuilt} has no _cuda*{run.facts.get('extensions')}: built here")
    if run.capability() < (8, 0):
        raise LeftOut("this GPU is older than compute capability 8.0")
    run.tool("nvcc")
    return [run.python, "setup.py", "-q", "build_ext", "--inplace", "--only", "_cuda"]


def build_cpu(run: Run, limit: float) -> list[str]:
    """Build the C++ part."""
    return [run.python, "setup.py", "-q", "build_ext", "--inplace", "--only", "_cpu"]


def figures(script: str, *given: str) -> Callable[[Run, float], list[str]]:
    """Return a script whose figures go into kernels.json, and which begins nothing new shortly
    before its limit. Rows that are built by nothing slow are Triton's where there is no CUDA
    part."""

    def command(run: Run, limit: float) -> list[str]:
        fast = "cuda" if run.built() else "triton"
        made = [run.python, run.script(f"gpu_{script}"), str(run.out / "kernels.json")]
        made += ["--text", str(run.work / f"{script}.txt")]
        made += ["--seconds", f"{max(1.0, 0.85 * limit - 3.0):.0f}"]
        return made + [fast if word == "FAST" else word for word in given]

    return command


def kernels(*given: str, only: tuple[str, ...] = ()) -> Callable[[Run, float], list[str]]:
    """gpu_kernels.py."""
    return figures("kernels", *given, *(word for key in only for word in ("--only", key)))


def baselines(*parts: str) -> Callable[[Run, float], list[str]]:
    """gpu_baselines.py."""
    return figures("baselines", *(word for part in parts for word in ("--part", part)))


def sanitizer(tool: str, backend: str, share: float) -> Part:
    """Return a tool of compute-sanitizer on every op of a backend once. What torch asks of CUDA in
    vain is torch's affair."""

    def command(run: Run, limit: float) -> list[str]:
        made = [run.tool("compute-sanitizer"), "--tool", tool, "--report-api-errors", "no"]
        made += ["--error-exitcode", "9", run.python, run.script("gpu_kernels")]
        return [*made, "--profile", "--tiny", "--backend", backend]

    # A pool hides what lies outside a tensor.
    settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **PATIENT}
    return Part(f"{tool}-{backend}", share, 10, command, environment=settings, said="SUMMARY")


def tests(name: str, share: float, is_ours: bool) -> Part:
    """Return the tests marked gpu, of the CUDA kernels or of all else. One file that cannot be
    imported stops that file; a warning of a newer torch stops nothing."""

    def command(run: Run, limit: float) -> list[str]:
        made = [run.python, "-m", "pytest", "-q", "-n", "8", "-m", "gpu", "-p", "no:cacheprovider"]
        made += ["-W", "default", "--continue-on-collection-errors"]
        if is_ours:
            return made + sorted(map(str, (run.root / "tests" / "kernels").glob("test_cuda_*.py")))
        return [*made, "tests", "--ignore-glob=*/test_cuda_*.py"]

    said = r"^(FAILED|ERROR) |^\d+ .* in [\d.]+s|^no tests ran"
    return Part(name, share, 20, command, interrupt=True, said=said)


def ncu(run: Run, limit: float) -> list[str]:
    """Each main op once, under ncu."""
    run.tool("ncu")
    return [run.python, run.script("gpu_kernels"), "--under-ncu", str(run.work / "ncu.csv")]


def ncu_table(run: Run, limit: float) -> list[str]:
    """Say what ncu saw, as far as it came."""
    if not (run.work / "ncu.csv").exists():
        raise LeftOut("ncu wrote nothing")
    return [run.python, run.script("gpu_kernels"), "--ncu", str(run.work / "ncu.csv")]


def command_line(name: str, *given: str) -> Callable[[Run, float], list[str]]:
    """Return a command of fused-dni whose report goes to OUT, if it makes one."""

    def command(run: Run, limit: float) -> list[str]:
        out = () if name == "tune" else ("--out", str(run.out / f"{name}.json"))
        return [run.python, "-m", "fused_dni", name, *given, "--device", "cuda", "--quiet", *out]

    return command


LAYER = ("linear", "--in", "1024", "--batch", "128")
ALL_ROWS = ("--part", "layer", "--part", "lstm", "--rows")
RIVAL_ARMS = ("backprop", "graph", "fused", "cdni-4", "cdni-16")

PARTS: dict[str, tuple[Part, ...]] = {
    "first": (
        Part("build", 80, 15, build, stretch=1.6),
        Part("smoke", 20, 6, kernels("--part", "smoke", "--rows", "FAST")),
        Part("floors", 15, 6, baselines("device", "gaps", "bandwidth", "gemm")),
        Part("barriers", 10, 4, kernels("--part", "floors", "--rows", "FAST")),
        Part("rows", 55, 10, kernels(*ALL_ROWS, "FAST", only=KEYS)),
        sanitizer("memcheck", "cuda", 30),
        sanitizer("racecheck", "cuda", 30),
    ),
    "second": (
        Part("build", 40, 15, build, stretch=2.0),
        Part("build-cpu", 20, 15, build_cpu, stretch=1.5),
        tests("tests-cuda", 60, is_ours=True),
        tests("tests", 50, is_ours=False),
        Part("rows-triton", 60, 15, kernels(*ALL_ROWS, "triton", only=KEYS)),
        Part("compiled", 40, 20, kernels(*ALL_ROWS, "compiled", only=KEYS[:2])),
        Part("autotuned", 50, 30, kernels(*ALL_ROWS, "autotuned", only=KEYS[:1])),
        Part("ncu", 30, 15, ncu, environment=PATIENT),
        Part("ncu-table", 3, 2, ncu_table, said="."),
        Part(
            *("tune", 30, 15),
            command_line("tune", *LAYER, "--ops", "linear_step", "--seconds", "0.5"),
        ),
        Part(
            *("verdict", 25, 15),
            command_line(
                *("verdict", *LAYER, "--normalization", "batch", "--activation", "relu"),
                *("--synthesizers", "rank16", "--interface", "output", "--no-compile"),
                *("--seconds", "3"),
            ),
        ),
        Part(
            *("map", 25, 15),
            command_line(
                *("map", "--batches", "64", "128", "--widths", "256", "1024"),
                *("--synthesizers", "rank16", "--seconds", "1"),
            ),
        ),
        Part(
            *("rivals", 25, 15),
            command_line(
                *("rivals", "--arms", *RIVAL_ARMS, "--seeds", "1"),
                *("--seconds-per-run", "1", "--seconds", "4"),
            ),
        ),
        Part("network", 20, 10, baselines("network")),
        Part("more-rows", 40, 10, kernels(*ALL_ROWS, "FAST", "--rows", "triton", "--resume")),
        sanitizer("synccheck", "cuda", 20),
        sanitizer("memcheck", "triton", 20),
        sanitizer("racecheck", "triton", 20),
    ),
}


# -------------------------------------------------------------------------------------- summary


def summary(run: Run) -> str:
    """Say what is known so far, the most important lines last."""
    parts, facts = run.record["parts"], run.record["environment"]
    lines = [
        f"{facts.get('name')}, driver {facts.get('driver')}, torch {facts.get('torch')}, commit "
        f"{run.commit}"
    ]
    for entry in parts:
        if entry["status"] == "done":
            lines.append(f"{entry['call']} {entry['name']}: done in {entry['seconds']:g} s")
    for text in ("baselines.txt", "kernels.txt"):
        with contextlib.suppress(OSError):
            lines.append((run.work / text).read_text(encoding="utf-8").rstrip())
    for entry in parts:
        lines += [f"{entry['name']}: {line}" for line in entry.get("said", ())]
    lines += run.notes
    for entry in parts:
        if entry["status"] == "running":
            lines.append(f"{entry['call']} {entry['name']}: was running")
        elif entry["status"] != "done":
            lines.append(f"FAILED  {entry['call']} {entry['name']}: {entry['why']}")
    if all(entry["status"] == "done" for entry in parts):
        lines.append("no part has failed")
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def ended_by_terminate() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does: what runs is stopped, what is known is written."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(
    arguments: list[str], machine: Machine | None = None, environ: Mapping[str, str] = os.environ
) -> int:
    """Run a call, or both; 0 all parts done, 1 not all, 2 wrong use, 3 no GPU."""
    machine = machine or Machine()
    named = arguments[:1] if arguments and arguments[0] in CALLS else []
    calls, rest = named or list(CALLS), arguments[len(named) :]
    usual = sum(CALLS[call] for call in calls)
    out, given = (*rest, str(usual))[:2] if rest else ("-", "")
    if len(rest) > 2 or out.startswith("-") or not re.fullmatch(r"[1-9]\d*(\.\d+)?", given):
        print(USAGE, file=sys.stderr)
        return 2
    names = [part.name for call in calls for part in PARTS[call]]
    for name in environ.get("ONLY", "").split():
        if name not in names:
            print(f"bench/gpu.sh: ONLY={name} is no part: {' '.join(names)}", file=sys.stderr)
            return 2
    budget, start = float(given), machine.now()
    with tempfile.TemporaryDirectory(prefix="gpu-run-") as work, ended_by_terminate():
        run = Run(machine, environ, Path(work))
        status, why = run.probe()
        if status:
            print(f"bench/gpu.sh: {why}", file=sys.stderr)
            return status
        run.look()
        run.settle(Path(out).absolute(), calls)
        end = start
        try:
            for call in calls:
                end += budget * CALLS[call] / usual
                run.call(call, PARTS[call], end)
        finally:
            run.save()
            print(summary(run), end="", flush=True)
        states = [e["status"] for e in run.record["parts"] if e["call"] in calls]
        return 0 if all(state == "done" for state in states) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
