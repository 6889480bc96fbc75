"""Every kernel's machine code, for GPUs that are not there: kernels/aot.py in processes of its own.

The specimens of kernels/ are compiled for three architectures and have to keep to the bounds that
they state: nearly all of them for the one that the rules of thumb are made for, and of each kernel
and phase one for the others (of all, that would be minutes of a processor). A few that are much
like another are left to `make test-all`. Specimens that break one bound each show that the tool
sees it. The table of all figures is printed (pytest -s), a digest of it stands at the end of the
report.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import planted_specimens
import pytest
import torch
from fused_dni.kernels import aot

pytestmark = pytest.mark.slow(450)

SUPPORT = Path(__file__).resolve().parents[1] / "support"
PLAIN = r"bf16( forward| backward| 128x1024)?$|bf16 diagonal|step 128x1024 bf16 (dense|preact)"
# What a specimen's name behind its kernel's has to match, by architecture; and of `make test-all`.
OTHER = r"synthesizer_kernel: (train dense adam|predict table|train table dense) bf16 128x1024$"
PHASES = r"linear_kernel: (product 4096x4096 bf16 (dx|preact)|weight 4096x4096 bf16 (dense|preact))"
MATCH = {80: f"^(?!{OTHER}).*({PLAIN})", 90: f"^(?!{PHASES})", 100: f"^(?!{OTHER}).*({PLAIN})"}
SELDOM = {80: f"^{OTHER}", 90: f"^{PHASES}", 100: f"^{OTHER}"}
CASES = [
    pytest.param(
        architecture, match, specimen.launch.kernel.__name__, specimen.name,
        marks=[pytest.mark.repeat] * (matches is SELDOM),
        id=f"{architecture}-{specimen.launch.kernel.__name__}-{specimen.name}",
    )
    for matches in (MATCH, SELDOM)
    for architecture, match in matches.items()
    for specimen in aot.find_specimens((), architecture, match)
]  # fmt: skip


class Compiled(NamedTuple):
    """What the tool says."""

    status: int
    table: str
    outcomes: dict[tuple[str, str], dict[str, Any]]  # by kernel and specimen


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a process in which Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SUPPORT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def compiled(architecture: int, match: str, folder: Path, *modules: str) -> Compiled:
    """The specimens of these modules, of all kernels if none is named."""
    file = folder / f"{architecture}.json"
    tool = ("-m", aot.__name__, "--arch", str(architecture), "--match", match, "--json", str(file))
    done = python(*tool, *modules)
    assert done.returncode in (0, 1), done.stderr
    print(f"\nsm_{architecture}\n{done.stdout}")
    outcomes = json.loads(file.read_text(encoding="utf-8"))
    found = {(o["kernel"], o["specimen"]): o for o in outcomes}
    assert len(found) == len(outcomes), "two specimens of one name"
    return Compiled(done.returncode, done.stdout, found)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Compiled]:
    """Kernels that a pattern matches, compiled for an architecture when first asked for."""

    @functools.cache
    def made(architecture: int, match: str) -> Compiled:
        return compiled(architecture, match, tmp_path_factory.mktemp("compiled"))

    return made


@pytest.mark.parametrize(("architecture", "match", "kernel", "specimen"), CASES)
def test_machine_code_keeps_to_its_bounds(
    kernels: Callable[..., Compiled],
    architecture: int,
    match: str,
    kernel: str,
    specimen: str,
    record_property: Callable[[str, object], None],
) -> None:
    """No spills beyond the bound, a block's memory, tensor cores, 128-bit loads, grid barriers."""
    outcome = kernels(architecture, match).outcomes[kernel, specimen]
    if outcome["code"] is not None:
        figures = [outcome["code"][name] for name in ("registers", "stack", "shared")]
        found = [*figures, outcome["code"]["tensor_cores"], bool(outcome["broken"])]
        record_property("machine code", [f"{kernel}, sm_{architecture}", *found])
    assert not outcome["broken"], outcome


def test_kernels_that_wait_for_each_other_are_among_them(
    kernels: Callable[..., Compiled],
) -> None:
    """Where a barrier is, it is sound, or the bound would be broken; so there has to be one."""
    assert any(o["code"]["barriers"] for o in kernels(90, MATCH[90]).outcomes.values() if o["code"])


@pytest.mark.parametrize("architecture", MATCH)
def test_a_step_at_the_preactivation_has_a_barrier_less(
    kernels: Callable[..., Compiled], architecture: int
) -> None:
    """That of layer norm's row sums on the way back, with rows that do not fit into a tile."""
    outcomes = kernels(architecture, MATCH[architecture]).outcomes
    output = outcomes["linear_kernel", "step 128x1024 bf16 dense layer gelu"]["code"]
    inside = outcomes["linear_kernel", "step 128x1024 bf16 preactivation"]["code"]
    assert inside["barriers"] == output["barriers"] - 1


# ---------------------------------------------------------------------------------------------
# Whether the tool sees what it looks for


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compiled(90, "", tmp_path_factory.mktemp("planted"), planted_specimens.__name__)


@pytest.mark.parametrize(
    ("kernel", "specimen"),
    [(s.launch.kernel.__name__, s.name) for s in planted_specimens.specimens(90)],
)
def test_broken_bounds_are_seen(planted: Compiled, kernel: str, specimen: str) -> None:
    broken = planted.outcomes[kernel, specimen]["broken"]
    if specimen.startswith("good"):
        assert broken == []
    else:
        (what,) = broken
        assert specimen in what


def test_figures_of_a_planted_kernel(planted: Compiled) -> None:
    """Of a product of 128x128 tiles, 64 deep in bfloat16, with three stages on four warps."""
    code = planted.outcomes["product_kernel", "good product"]["code"]
    assert code["tensor_cores"] == ["wgmma"]
    assert code["shared"] == 3 * 2 * (128 * 64) * 2
    assert 128 <= code["registers"] <= 255  # 128 of them hold the result
    assert code["wide_loads"] == code["loads"] > 0
    code = planted.outcomes["described_kernel", "good descriptors"]["code"]
    assert code["wide_loads"] == code["loads"] > 0
    code = planted.outcomes["product_kernel", "128-bit"]["code"]
    assert code["wide_loads"] == 0 < code["loads"]
    code = planted.outcomes["meeting_kernel", "good meeting True"]["code"]
    assert code["barriers"] == code["sound_barriers"] == 2


ARRIVE = "@%p6 atom.global.gpu.acq_rel.add.u32 %r24, [ %rd29 + 0 ], %r36;"
WAIT = "@%p6 ld.global.gpu.acquire.b32 %r25, [ %rd29 + 0 ];"
STORE = "st.global.v4.b32 [ %rd38 + 0 ], { %r7, %r8, %r9, %r10 };"
LOAD = "ld.global.b32 { %r28 }, [ %rd19 + 0 ];"
BLOCK = "bar.sync 0;"
GIVE_UP = "@%p6 atom.global.relaxed.gpu.cas.b32 %r26, [ %rd29 + 0 ], %r25, %r27;"
AGAIN = ("@%p7 bra $L__BB0_1;", "bra.uni $L__BB0_2;")


@pytest.mark.parametrize(
    ("instructions", "sound"),
    [
        ((STORE, BLOCK, ARRIVE, BLOCK, BLOCK, WAIT, BLOCK, LOAD), 1),
        ((STORE, ARRIVE, BLOCK, BLOCK, WAIT, BLOCK, LOAD), 0),
        ((BLOCK, STORE, ARRIVE, BLOCK, WAIT, BLOCK, LOAD), 0),
        ((STORE, BLOCK, ARRIVE, BLOCK, LOAD, BLOCK, WAIT, BLOCK), 0),
        ((STORE, BLOCK, ARRIVE, BLOCK, WAIT, LOAD, BLOCK), 0),
        ((STORE, BLOCK, ARRIVE, BLOCK, WAIT), 0),
        ((STORE, BLOCK, ARRIVE.replace("acq_rel", "relaxed"), BLOCK, WAIT, BLOCK, LOAD), 0),
        ((ARRIVE, BLOCK, WAIT, BLOCK), 0),
        ((WAIT, BLOCK), 0),
        (
            (BLOCK, ARRIVE, BLOCK, "$L__BB0_1:", WAIT, BLOCK, GIVE_UP, *AGAIN, "$L__BB0_2:", BLOCK),
            1,
        ),
        (
            (BLOCK, ARRIVE, BLOCK, "$L__BB0_1:", WAIT, GIVE_UP, BLOCK, *AGAIN, "$L__BB0_2:", BLOCK),
            0,
        ),
        # The compiler moves what is rarely run: where it stands says nothing.
        (
            (
                BLOCK,
                ARRIVE,
                "bra.uni $L__BB0_1;",
                "$L__BB0_2:",
                LOAD,
                "ret;",
                "$L__BB0_1:",
                WAIT,
                BLOCK,
                *AGAIN,
            ),
            1,
        ),
        (
            (
                BLOCK,
                ARRIVE,
                "bra.uni $L__BB0_3;",
                "$L__BB0_2:",
                LOAD,
                "ret;",
                "$L__BB0_3:",
                STORE,
                "$L__BB0_1:",
                WAIT,
                BLOCK,
                *AGAIN,
            ),
            0,
        ),
        # A way around the arrival, and one around the block's barrier in front of it.
        (("@%p1 bra $L__BB0_1;", BLOCK, ARRIVE, BLOCK, "$L__BB0_1:", WAIT, BLOCK, STORE), 0),
        ((STORE, "@%p1 bra $L__BB0_1;", BLOCK, ARRIVE, BLOCK, "$L__BB0_1:", WAIT, BLOCK), 0),
        ((STORE, "@%p1 bra $L__BB0_1;", BLOCK, "$L__BB0_1:", ARRIVE, BLOCK, WAIT, BLOCK), 0),
    ],
)
def test_grid_barriers_out_of_order_are_seen(instructions: tuple[str, ...], sound: int) -> None:
    assert aot.grid_barriers("\n".join(instructions)) == (1, sound)


SASS = """
        /*5660*/                   PRMT R21, RZ, 0x7610, R21 ;   /* 0x00007610ff157816 */
                                                                 /* 0x000fe20000000015 */
        /*5700*/               @P0 LDG.E.U16 R21, desc[UR16][R18.64] ;
        /*5710*/              @!P0 LDG.E.64 R22, desc[UR16][R18.64+0x800] ;
        /*5720*/                   LDG.E.128.STRONG.GPU R60, desc[UR16][R18.64] ;
        /*5730*/                   {use}
        /*5740*/               @P0 MEMBAR.ALL.GPU ;
        /*5750*/               @P0 ATOMG.E.ADD.STRONG.GPU PT, R17, desc[UR16][R124.64], R19 ;
        /*5760*/                   FADD R1, R21, R22 ;
"""


@pytest.mark.parametrize(
    ("use", "count"),
    [
        ("BAR.SYNC.DEFER_BLOCKING 0x0 ;", 2),
        ("IMAD.U32 R50, R21, 0x10000, RZ ;", 1),
        ("IMAD.U32 R21, R50, 0x10000, RZ ;", 1),
        ("FADD R50, R23, 1 ;", 1),  # the second register of its load
        ("FADD R50, R24, R20 ;", 2),
        ("DADD R50, R20.reuse, R40 ;", 1),
        ("STS.128 [R120+0x20000], R20 ;", 0),
        ("STS.128 [R20], R40 ;", 2),
        ("HMMA.16816.F32.BF16 R24, R20, R40, R24 ;", 0),
        ("LDG.E R50, desc[UR16][R20.64] ;", 2),  # waits for one, is one itself
    ],
)
def test_loads_that_are_looked_at_too_early_are_seen(use: str, count: int) -> None:
    assert aot.in_flight(SASS.replace("{use}", use)) == count
    assert aot.in_flight(SASS.replace("{use}", "NOP ;") + SASS.replace("{use}", use)) == count
    assert aot.in_flight(use) == 0


def test_bounds_that_no_planted_kernel_breaks() -> None:
    """A barrier out of order, and more of Blackwell's tensor memory than there is."""
    specimen = next(s for s in planted_specimens.specimens(100) if s.name == "good meeting True")
    code = aot.MachineCode(32, 0, 0, 512, (), 1, 1, 2, 2, 0, "")
    assert aot.broken_bounds(specimen, code, 100) == []
    (broken,) = aot.broken_bounds(specimen, code._replace(sound_barriers=1), 100)
    assert broken == "1 grid barriers out of order"
    (broken,) = aot.broken_bounds(specimen, code._replace(tensor_memory=513), 100)
    assert broken == "tensor memory 513 columns, there are 512"


def test_tool_reports_failure(planted: Compiled) -> None:
    assert planted.status == 1
    for kernel, specimen in planted.outcomes:
        assert f"{kernel}: {specimen} " in planted.table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arch", "75"), "invalid choice: 75"),
        (
            ("--arch", "90", "--match", "no such name"),
            "'no such name' is found in no specimen's name",
        ),
        (("--arch", "90", "no_such_module"), "No module named 'no_such_module'"),
    ],
)
def test_tool_refuses(arguments: tuple[str, ...], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped, pytest.MonkeyPatch.context() as patch:
        patch.setattr(aot.knobs.runtime, "interpret", False)
        aot.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_tool_refuses_under_the_interpreter(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot.knobs.runtime, "interpret", True)
    with pytest.raises(SystemExit):
        aot.main(["--arch", "90"])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
    (specimen, *_) = planted_specimens.specimens(90)
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        aot.compile_launch(specimen.launch, 90)


# ---------------------------------------------------------------------------------------------
# Whether what it compiles is what runs


def test_arguments_are_specialised_as_when_launched() -> None:
    """Type, constants, and what is known to be divisible by 16 (pointers in bytes), of an argument
    at place 0; the parameters of tuples at their paths. As Triton's documentation of ``jit`` says,
    on all versions."""
    done = python(str(SUPPORT / "planted_specimens.py"))
    assert done.returncode == 0, done.stderr
    aligned = ["(0,)"]
    assert json.loads(done.stdout) == {
        "pointer": ["*fp32", {}, aligned],
        "pointer off by an element": ["*fp32", {}, []],
        "pointer off by 16 bytes": ["*fp32", {}, aligned],
        "bfloat16": ["*bf16", {}, aligned],
        "int64": ["*i64", {}, aligned],
        "1": ["constexpr", {"(0,)": "1"}, []],
        "0": ["i32", {}, aligned],
        "16": ["i32", {}, aligned],
        "17": ["i32", {}, []],
        "2**31": ["i64", {}, aligned],
        "2**31 - 1": ["i32", {}, []],
        "float": ["fp32", {}, []],
        "bool": ["u1", {}, []],
        "None": ["constexpr", {"(0,)": "None"}, []],
        "tuple": [
            [["*fp32", "constexpr"], ["i32", "constexpr"]],
            {"(0, 0, 1)": "None", "(0, 1, 1)": "1"},
            ["(0, 0, 0)", "(0, 1, 0)"],
        ],
        "descriptor": ["tensordesc<fp32[16, 32]>", {}, []],
        "constant": ["constexpr", {"(0,)": "name"}, []],
    }


@pytest.mark.gpu
def test_launch_on_a_device_runs_what_was_compiled_ahead(planted: Compiled) -> None:
    """Triton's key of a compiled kernel is of source, types, constants, options and target."""
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) != (9, 0):
        pytest.skip(f"planted specimens are compiled for sm_90, this is sm_{major}{minor}")
    launch = planted_specimens.meeting(True, "cuda", launch_cooperative_grid=True)
    ran = launch.kernel[launch.grid](**launch.arguments, **launch.options)
    code = planted.outcomes["meeting_kernel", "good meeting True"]["code"]
    assert ran.metadata.hash == code["hash"]


def test_the_compiler_takes_every_kernel_with_every_option(tmp_path: Path) -> None:
    """What the interpreter runs in all other tests, the compiler may refuse."""
    file = tmp_path / "everything.json"
    done = python(str(SUPPORT / "compile_everything.py"), str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(file.read_text(encoding="utf-8"))
    assert made["launches"] > 150
    assert made["failures"] == {}
