"""What a GPU does without us: bandwidth, products, launch gaps, stock backprop of a network.

    python bench/gpu_baselines.py OUT/kernels.json [--part gemm ...] [--seconds 280]

Baselines of single layers and of the LSTM are measured beside our kernels (gpu_kernels.py), whose
file this adds its own to, under "baselines". Uses no kernel of ours, so that it runs where our
build failed. Every part is on its own: one that raises, or for which no time is left, is
recorded with its reason and the rest go on; the file, and a text with the same name beside it, are
rewritten after every figure. ``--device cpu --tiny`` runs the same code on sizes that only show
that it runs.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import itertools
import platform
import sys
import sysconfig
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stored
from fused_dni.measure.environment import output_of
from fused_dni.measure.timing import compare


class Where(NamedTuple):
    """Where to run, how large, until when, and what keeps the figures so far."""

    device: str
    tiny: bool
    deadline: float
    save: Callable[[], None]

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def sizes(self, full: list[Any], tiny: list[Any]) -> list[Any]:
        return tiny if self.tiny else full

    def late(self) -> bool:
        return time.monotonic() > self.deadline


#: For the calls of one figure.
SECONDS = 0.2


class NoTimeLeftError(RuntimeError):
    """The budget is spent; what was measured so far is kept."""


def seconds_a_call(call: Callable[[], object], where: Where) -> float:
    """Median over rounds of calls, after a warm-up; by CUDA events on a GPU."""
    if where.late():
        raise NoTimeLeftError("no time left")
    limits: dict[str, Any] = {"rounds": 1} if where.tiny else {"seconds": SECONDS}
    return compare({"": call}, device=where.device, **limits)[""].median


def graphed(step: Callable[[], object]) -> Callable[[], None]:
    """``step`` as the replay of a CUDA graph (after a warm-up on a side stream, as documented)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


# ---------------------------------------------------------------------------------------- parts


def driver() -> str | None:
    """Return the NVIDIA driver's version; None where nvidia-smi does not say."""
    said = nvidia_smi("driver_version")
    return None if said is None else said.split("\n", 1)[0].strip() or None


def nvidia_smi(query: str) -> str | None:
    """Return a line a GPU; None where there is no such tool."""
    return output_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")


def driver_cuda() -> str | None:
    """Return the CUDA version that the driver is for; None without a driver."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def device(where: Where, facts: dict[str, Any]) -> None:
    """Names, versions and clocks."""
    facts |= {
        "python": platform.python_version(),
        "extensions": sysconfig.get_config_var("EXT_SUFFIX"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    if where.cuda:
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": properties.total_memory / 2**30,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver(),
            "driver_cuda": driver_cuda(),
            "nvidia-smi": nvidia_smi("driver_version,clocks.max.sm,clocks.max.mem,power.limit"),
        }
    else:
        facts["name"] = platform.machine()


def bandwidth(where: Where, found: dict[str, Any]) -> None:
    """Copy of a large tensor; bytes read and written over time."""
    rates = found["gb_per_s"] = {}
    for megabytes in where.sizes([64, 512, 2048], [1]):
        source = torch.empty(megabytes * 2**18, device=where.device)
        target = torch.empty_like(source)
        taken = seconds_a_call(lambda s=source, t=target: t.copy_(s), where)
        rates[f"{megabytes} MiB"] = 2 * megabytes * 2**20 / taken / 1e9
        where.save()


def gemm(where: Where, found: dict[str, Any]) -> None:
    """TFLOP/s of ``torch.mm(out=)`` in bf16, tf32 and fp32."""
    full = [(128, 1024, 1024), (1024,) * 3, (4096,) * 3, (8192,) * 3]
    rates: dict[str, dict[str, float]] = found.setdefault("tflop_per_s", {})
    before = torch.get_float32_matmul_precision()
    try:
        for name, dtype, precision in (
            ("bf16", torch.bfloat16, "highest"),
            ("tf32", torch.float32, "high"),
            ("fp32", torch.float32, "highest"),
        ):
            torch.set_float32_matmul_precision(precision)
            rates[name] = {}
            for m, k, n in where.sizes(full, [(32, 32, 32)]):
                a = torch.randn(m, k, device=where.device, dtype=dtype)
                b = torch.randn(k, n, device=where.device, dtype=dtype)
                out = torch.empty(m, n, device=where.device, dtype=dtype)
                taken = seconds_a_call(lambda a=a, b=b, o=out: torch.mm(a, b, out=o), where)
                rates[name][f"{m}x{k}x{n}"] = 2 * m * k * n / taken / 1e12
                where.save()
    finally:
        torch.set_float32_matmul_precision(before)


def gaps(where: Where, found: dict[str, Any]) -> None:
    """Microseconds a kernel that does nothing much: launched eagerly, and inside a graph."""
    x = torch.zeros(32, device=where.device)
    count = 100

    def many() -> None:
        for _ in range(count):
            x.add_(1.0)

    found["eager_us"] = seconds_a_call(many, where) / count * 1e6
    if where.cuda:
        found["graph_us"] = seconds_a_call(graphed(many), where) / count * 1e6
        found["graph_of_one_us"] = seconds_a_call(graphed(lambda: x.add_(1.0)), where) * 1e6


def network(where: Where, found: dict[str, Any]) -> None:
    """Run the step of the CPU tables: four hidden layers, batch norm, ReLU, head, cross-entropy."""
    rows: dict[str, dict[str, Any]] = found.setdefault("us", {})
    sizes = where.sizes([(64, 256), (128, 512), (128, 1024)], [(8, 16)])
    for name, how in variants(where).items():
        for (batch, hidden), rule in itertools.product(sizes, ("sgd", "adam")):
            attempt(
                rows.setdefault(f"{batch}/{hidden} {rule}", {}),
                name,
                lambda b=batch, h=hidden, r=rule, n=how: network_time(b, h, r, n, where),
            )
            where.save()


def variants(where: Where) -> dict[str, str]:
    """Say how a step is run, by name; replayed and compiled where that is possible."""
    found = {"eager": "eager"}
    if where.cuda:
        found["graph"] = "graph"
    if not where.tiny:
        found["compiled"] = "default"
    return found


def network_time(batch: int, hidden: int, rule: str, how: str, where: Where) -> float:
    modules: list[nn.Module] = []
    for _ in range(4):
        modules += [nn.Linear(hidden, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
    module = nn.Sequential(*modules, nn.Linear(hidden, 10)).to(where.device)
    options: dict[str, Any] = {"lr": 1e-4, "fused": True}
    kind: Any = torch.optim.SGD
    if rule == "adam":
        kind = torch.optim.Adam
        options["capturable"] = where.cuda
    optimizer = kind(module.parameters(), **options)
    x = torch.randn(batch, hidden, device=where.device)
    y = torch.randint(0, 10, (batch,), device=where.device)
    torch._dynamo.reset()

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(module(x), y)

    forward = torch.compile(loss_of) if how == "default" else loss_of

    def step() -> None:
        optimizer.zero_grad()
        forward(x, y).backward()
        optimizer.step()

    return seconds_a_call(graphed(step) if how == "graph" else step, where) * 1e6


PARTS = {part.__name__: part for part in (device, gaps, bandwidth, gemm, network)}


def attempt(entry: dict[str, Any], name: str, measure: Callable[[], float]) -> None:
    """One figure, or the reason why there is none. Running out of time ends the part."""
    try:
        entry[name] = measure()
    except NoTimeLeftError:
        entry[name] = "no time left"
    except Exception as error:
        entry[name] = f"failed: {type(error).__name__}: {str(error).splitlines()[:1]}"


def measure(out: Path, parts: list[str], where: Where, text: Path) -> int:
    """Measure the parts; returns how many failed."""
    results = stored.benchmarks(out)
    found: dict[str, Any] = results.body.setdefault("baselines", {})

    def save() -> None:
        stored.write(out, results)
        text.write_text(summary(found) + "\n", encoding="utf-8")

    failed = 0
    for name in parts:
        start = time.monotonic()
        found[name] = {}
        try:
            PARTS[name](where._replace(save=save), found[name])
        except Exception as error:
            failed += 1
            if not isinstance(error, NoTimeLeftError):
                traceback.print_exc()
            found[name]["failed"] = f"{type(error).__name__}: {error}"
        found.setdefault("part_seconds", {})[name] = time.monotonic() - start
        save()
        print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
    return failed


# -------------------------------------------------------------------------------------- summary


def summary(results: dict[str, Any]) -> str:
    """Return the figures as text, the ones that decide most at the end."""
    lines = []
    for part in ("device", "gemm", "bandwidth", "gaps", "network"):
        facts = results.get(part)
        if facts is None:
            lines.append(f"{part}: not reached")
            continue
        failed = facts.get("failed")
        lines.append(part if failed is None else f"{part}: FAILED: {failed}")
        units = {"gb_per_s": "GB/s", "tflop_per_s": "TFLOP/s", "us": "us", "ms": ""}
        for key, value in facts.items():
            if key == "failed":
                continue
            if isinstance(value, dict):
                for row, cells in value.items():
                    lines.append(f"  {row:24} {cell(cells)} {units.get(key, key)}".rstrip())
            else:
                lines.append(f"  {key:24} {cell(value)}")
    return "\n".join(lines)


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "  ".join(f"{key} {cell(item)}" for key, item in value.items())
    return str(value)


def why_no_gpu() -> str | None:
    """Say why nothing can be measured on a GPU here, in one line; None if it can."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    reasons = [str(warning.message).strip().splitlines()[0] for warning in said]
    return ": ".join(["no CUDA device", *(reasons or ["torch.cuda.is_available() is false"])])


def parser() -> argparse.ArgumentParser:
    """Return the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="JSON to write")
    parser.add_argument("--part", action="append", choices=tuple(PARTS))
    parser.add_argument("--seconds", type=float, default=280.0)
    parser.add_argument("--text", type=Path, help="where the figures are kept as text")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: does it run at all")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    given = parser().parse_args(arguments)
    reason = why_no_gpu() if given.device == "cuda" else None
    if reason is not None:
        print(reason, file=sys.stderr)
        return 3
    deadline = time.monotonic() + given.seconds
    where = Where(given.device, given.tiny, deadline, lambda: None)
    text = given.text or given.file.with_suffix(".txt")
    return 1 if measure(given.file, given.part or list(PARTS), where, text) else 0


if __name__ == "__main__":
    sys.exit(main())
