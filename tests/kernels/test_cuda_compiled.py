"""The machine code of the CUDA kernels, for every architecture: no GPU is needed, and what is
installed is for this machine's alone, so that it is built here (support/built.py: minutes, and then
only what has changed; for which architectures every precision, stands there). NVIDIA's disassembler
comes with Triton."""

from __future__ import annotations

import collections
import hashlib
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import built
import pytest
from triton import knobs

pytestmark = pytest.mark.slow(700)

#: And whether every kernel is compiled for it.
ARCHITECTURES = [
    *((name, True) for name in built.MODULE.split(";")),
    *((name, False) for name in built.OTHERS.split(";")),
    *(pytest.param((name, True), marks=pytest.mark.repeat) for name in built.OTHERS.split(";")),
]


class Bound(NamedTuple):
    """What one kernel function may take, over all that it is compiled for."""

    registers: int
    # Bytes of a thread's local memory: registers that went through it, arrays that are indexed.
    # With 0 there is no local load or store, in a main loop or anywhere else.
    stack: int
    variants: int  # what it is compiled for: precisions, types, shapes of tiles
    products: bool = True  # of tensor cores, where operands are not float32's own


# A block has 256 threads: 255 registers each are all that there are.
BOUNDS = {
    "linear_kernel": Bound(224, 0, 12),
    "synthesizer_kernel": Bound(208, 0, 4),  # 197 on sm_120
    "forward_kernel": Bound(255, 144, 4),  # on sm_80; 48 elsewhere
    "backward_kernel": Bound(255, 128, 4),  # on sm_80; 64 elsewhere
    "update_kernel": Bound(192, 32, 4),
    "barriers_kernel": Bound(32, 0, 1, products=False),
}


class Code(NamedTuple):
    """What is read off one kernel function."""

    kernel: str  # as in BOUNDS
    signature: str
    registers: int
    stack: int
    instructions: collections.Counter[str]
    acquires: int  # waits for other blocks
    renewed: int  # of these, those behind which the first-level cache is emptied
    ahead: int  # loads between a step and its barrier, for the next one
    awaited: list[str]  # what needs one of them before that barrier
    called: list[str]  # functions of ours that are not part of it: calls, with what they hand on


def disassembled(architecture: str, files: list[Path]) -> list[Code]:
    """All kernels for an architecture in these files. Reading a megabyte of instructions takes as
    long as compiling some of them: what came of it is kept, for these files and this code."""
    content = hashlib.sha256(Path(__file__).read_bytes())
    for file in files:
        content.update(file.read_bytes())
    key = content.hexdigest()
    kept = built.BUILD / "cuda" / f"read-{architecture}-{len(files)}.json"
    if kept.exists():
        found = json.loads(kept.read_text())
        if found["of"] == key:
            return [
                Code(**{**row, "instructions": collections.Counter(row["instructions"])})
                for row in found["kernels"]
            ]
    codes = [code for file in files for code in _disassembled(architecture, str(file))]
    kept.write_text(json.dumps({"of": key, "kernels": [code._asdict() for code in codes]}))
    return codes


def look_ahead(code: list[str]) -> tuple[int, list[str]]:
    """How many loads stand in front of a cluster's barrier, behind the block's last one, and what
    waits for their registers before it (where there are clusters, a step's barrier is one)."""
    loads, waits = 0, []
    for at, line in enumerate(code):
        if "UCGABAR_ARV" not in line:
            continue
        first = at
        while first > 0 and "BAR.SYNC" not in code[first - 1]:
            first -= 1
        for i in range(first, at):
            load = re.match(r"(?:@!?U?P\w+ )?LDG\.\S+ (R\d+),", code[i])
            if load is not None:
                loads += 1
                waits += [used for used in code[i + 1 : at] if re.search(rf"\b{load[1]}\b", used)]
    return loads, waits


def _disassembled(architecture: str, path: str) -> list[Code]:
    tool = [knobs.nvidia.cuobjdump.path, "-arch", f"sm_{architecture}"]
    usage = subprocess.run([*tool, "-res-usage", path], capture_output=True, text=True, check=True)
    resources = {
        name: (int(registers), int(stack) + int(local))
        for name, registers, stack, local in re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout
        )
    }
    symbols = subprocess.run([*tool, "-elf", path], capture_output=True, text=True, check=True)
    # "$KERNEL$FUNCTION"; what the compiler brings, the slow path of a division, is __internal.
    beside = sorted(set(re.findall(r"\s\$(_Z\w+)\$(?!__internal)(\w+)", symbols.stdout)))
    listing = subprocess.run([*tool, "-sass", path], capture_output=True, text=True, check=True)
    parts = re.split(r"^\s*Function : (\S+)\s*$", listing.stdout, flags=re.MULTILINE)
    found = []
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        # "  /*0040*/  @!P0 LDG.E.128 R4, ..." without its encoding.
        body = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", text, re.M)
        waits = [i for i, what in enumerate(body) if re.match(r"LD\S*\.STRONG\.GPU", what)]
        kernel = re.search(r"\d+([a-z_]+_kernel)(?=I|E|N)", name)
        assert kernel is not None, name
        found.append(
            Code(
                kernel[1],
                name,
                *resources[name],
                collections.Counter(body),
                len(waits),
                sum("CCTL.IVALL" in body[i : i + 4] for i in waits),
                *look_ahead(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", text, re.M)),
                [function for caller, function in beside if caller == name],
            )
        )
    return found


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=str)
def kernels(request: pytest.FixtureRequest) -> tuple[str, list[Code]]:
    architecture, every = request.param
    module = built.cuda_extension()
    if architecture in module.architectures.split():
        return architecture, disassembled(architecture, [Path(str(module.__file__))])
    if tuple(map(int, module.toolkit.split("."))) < (12, 8):
        pytest.skip(f"CUDA {module.toolkit} makes no code for {architecture}")
    return architecture, disassembled(architecture, built.build_others(every))


def has(code: Code, pattern: str) -> bool:
    return any(re.fullmatch(pattern, what) for what in code.instructions)


def test_every_kernel_keeps_to_its_bounds(
    kernels: tuple[str, list[Code]], record_property: Callable[[str, object], None]
) -> None:
    architecture, codes = kernels
    broken = []
    for code in codes:
        bound = BOUNDS[code.kernel]
        exact = "4Fp32" in code.signature
        # Operands come by sixteen bytes, float16 that products take as TF32 by eight.
        wide = r"LDG\.E\.(128|64).*" if "Tf32E6__half" in code.signature else r"LDG\.E\.128.*"
        cores = ["mma"] if has(code, r"HMMA\..*") else []
        faults = [
            code.registers > bound.registers and f"{code.registers} registers",
            code.stack > bound.stack and f"{code.stack} bytes of stack",
            bound.products and not exact and not cores and "no tensor-core instruction",
            bound.products and not has(code, wide) and "no wide load",
        ]
        broken += [f"{code.signature}: {fault}" for fault in faults if fault]
        record_property(
            "machine code",
            [
                f"csrc/cuda {code.kernel}, sm_{architecture}",
                code.registers,
                code.stack,
                0,
                cores,
                any(faults),
            ],
        )
    assert broken == []


def test_kernels_call_nothing(kernels: tuple[str, list[Code]]) -> None:
    """A call hands on what it takes through local memory and through generic addresses, and waits
    for every load before it: kernels are one piece, but for the slow paths of divisions."""
    _, codes = kernels
    assert {code.signature: code.called for code in codes if code.called} == {}
    for code in codes:
        if BOUNDS[code.kernel].stack == 0:
            assert not has(code, r"(LDL|STL).*"), code.signature


def test_every_kernel_is_there(
    kernels: tuple[str, list[Code]], request: pytest.FixtureRequest
) -> None:
    _, codes = kernels
    _, every = request.node.callspec.params["kernels"]
    counts = collections.Counter(code.kernel for code in codes)
    wanted = {name: bound.variants for name, bound in BOUNDS.items()}
    if not every:
        wanted["linear_kernel"] //= 1 + len(built.REPEATED)
    assert counts == wanted


def test_what_other_blocks_write_is_read_through_the_coherent_cache(
    kernels: tuple[str, list[Code]],
) -> None:
    """Blocks read what others wrote in the same launch: nothing may come through the read-only
    path, and a wait for other blocks empties the first-level cache. (What no emulation shows.)"""
    _, codes = kernels
    for code in codes:
        assert not has(code, r"LDG\..*CONSTANT.*"), code.signature
        assert code.renewed == code.acquires, code.signature
        assert code.acquires > 0, code.signature


def test_a_steps_look_ahead_is_not_waited_for_in_front_of_its_barrier(
    kernels: tuple[str, list[Code]],
) -> None:
    """The LSTM asks for what the next step reads before it waits for the grid: to convert it there
    would be a trip to memory more in each step."""
    architecture, codes = kernels
    if architecture == "80":
        pytest.skip("without clusters a step's barrier is not told from others")
    for code in codes:
        if code.kernel not in ("forward_kernel", "backward_kernel"):
            continue
        # Gates; backwards also two cells and the gradient at h, whose type may be one of two.
        gates = 4 if code.kernel == "forward_kernel" else 7
        assert code.ahead == gates + ("Tf32E6__half" in code.signature), code.signature
        assert code.awaited == [], code.signature


def test_a_conversion_in_front_of_the_barrier_is_seen() -> None:
    before = ["LDG.E.U16 R9, desc[UR8][R8.64]", "IMAD.U32 R9, R9, 0x10000, RZ", "BAR.SYNC 0x0"]
    load = "@P0 LDG.E.U16 R221, desc[UR8][R8.64]"
    convert = "IMAD.U32 R221, R221, 0x10000, RZ"
    other = "IMAD.U32 R22, R22, 0x10000, RZ"
    assert look_ahead([*before, load, other, convert, "UCGABAR_ARV"]) == (1, [convert])
    assert look_ahead([*before, load, other, "UCGABAR_ARV", convert]) == (1, [])
