"""Launches of every kernel on tensors that are not there, as :mod:`fused_dni.kernels.aot` compiles
them, each with the bounds that its machine code has to keep to."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from fused_dni.kernels import linear, lstm, synthesizer
from fused_dni.kernels.barrier import RECORD, GridBarrier
from fused_dni.kernels.launch import Launch, Specimen
from torch import Tensor


def specimens(architecture: int) -> Iterator[Specimen]:
    """Yield all of them, for 80, 90 or 100."""
    yield from linear_specimens(architecture)
    yield from lstm_specimens(architecture)
    yield from synthesizer_specimens(architecture)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# ---------------------------------------------------------------------------------------------
# A linear layer's step


def _linear_step(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, problem: linear.Problem,
    tiles: linear.Tiles, dx: bool, tabled: bool,
) -> list[Launch]:  # fmt: skip
    """Plan a step with labels of ten classes, or of a table's ten rows, and a rank of 16."""
    rank, classes = 16, 10
    adam = problem.rule != "sgd"
    vectors = {
        name: _meta(outputs)
        for name in ("bias", "norm_weight", "norm_bias", "running_mean", "running_var")
    }
    shapes = {"dense": (outputs, outputs), "lowrank": (outputs, rank), "diagonal": (outputs,)}
    moments = {
        f"{order}_{slot}": _meta(outputs, inputs) if slot == "weight" else _meta(outputs)
        for order in ("first", "second")
        for slot in ("weight", "bias", "norm_weight", "norm_bias")
        if adam
    }
    low = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    t = linear.Tensors(
        x=_meta(rows, inputs, dtype=dtype),
        weight=_meta(outputs, inputs),
        **vectors,
        synthesizer_weight=_meta(*shapes[problem.source]),
        down=_meta(rank, outputs) if problem.source == "lowrank" else None,
        context_weight=_meta() if tabled else _meta(outputs, classes),
        synthesizer_bias=_meta(outputs),
        table=_meta(classes, outputs) if tabled else None,
        labels=_meta(rows, dtype=torch.int64),
        hyper=_meta(7, dtype=torch.float64),
        **moments,
        h=_meta(rows, outputs, dtype=dtype),
        normalized=_meta(rows, outputs),
        rstd=_meta(rows if problem.norm == "layer" else outputs),
        scaled=_meta(rows, outputs),
        reduced=_meta(rows, rank) if problem.source == "lowrank" else None,
        delta=_meta(rows, outputs, dtype=low),
        dx=_meta(rows, inputs, dtype=dtype) if dx else None,
    )
    t = linear.workspace(t, problem, tiles, linear.STEP_PHASES)
    if tiles.launches == "one":
        int32 = torch.int32
        t = t._replace(
            barrier=GridBarrier(_meta(1, dtype=int32), _meta(RECORD, dtype=int32), 2**21)
        )
    launches: list[Launch] = linear.plan(
        t, problem, tiles, linear.STEP_PHASES,
        (rows, inputs, outputs, rank if t.down is not None else 0, classes), 132,
    )  # fmt: skip
    return launches


def linear_specimens(architecture: int) -> Iterator[Specimen]:
    """Yield what the rules of thumb choose for a small and for a large layer, over dtypes, rules,
    synthesizers, interfaces and normalisations.

    What spills are allowed are a few registers around the epilogue of a product, once a tile.
    """
    step = linear.Problem(
        "batch", True, "relu", source="lowrank", target_scale=128.0, rule="sgd",
        trainable=(True, True, True, True),
    )  # fmt: skip
    dense = step._replace(source="dense", norm="layer", activation="gelu")
    inside = dense._replace(interface="preactivation", trainable=(True, True, False, False))
    half, full = torch.bfloat16, torch.float32
    cases: list[tuple[str, torch.dtype, linear.Problem, bool]] = [
        ("bf16", half, step, False),
        ("bf16 dx adam", half, step._replace(rule="adam"), True),
        ("bf16 dense layer gelu", half, dense, True),
        ("bf16 preactivation", half, inside, True),
        ("tf32", full, step._replace(precision="tf32"), False),
        ("fp32", full, step, False),
        ("bf16 table", half, step, False),
        ("fp16 diagonal", torch.float16, step._replace(source="diagonal", norm="none"), False),
    ]  # fmt: skip
    seen = set()
    for size, (rows, inputs, outputs) in {
        "128x1024": (128, 1024, 1024),
        "4096x4096": (4096, 4096, 4096),
    }.items():
        for name, dtype, problem, dx in cases if architecture == 90 else cases[:5]:
            tiles = linear.default_tiles(
                rows, inputs, outputs, dtype, problem.rule, problem.precision, architecture
            )
            tabled = "table" in name
            for launch in _linear_step(rows, inputs, outputs, dtype, problem, tiles, dx, tabled):
                phase = launch.arguments["FIRST"]
                part = "step" if tiles.launches == "one" else linear.PHASES[phase]
                multiplies = part in ("step", "product", "dx", "weight")
                # Phases without a product are much the same in all cases and architectures.
                key = f"{part} {problem.norm} {problem.source} {problem.interface} {tabled}"
                if not multiplies and (key in seen or architecture != 90):
                    continue
                if tabled and part not in ("step", "gradient"):  # the others read no table
                    continue
                seen.add(key)
                yield Specimen(
                    f"{part} {size} {name}", launch,
                    spills={"step": 32, "weight": 128, "product": 16}.get(part, 0),
                    tensor_cores=multiplies and name != "fp32",
                    wide_loads=part != "reduce",
                )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# An LSTM's window, step and update


def _window_specimens(
    name: str,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    precision: str,
    kind: str | None,
    machine: lstm.Machine,
    spills: int,
) -> Iterator[Specimen]:
    """Yield a window of B rows and H units forwards and backwards, and what surrounds it."""
    batch, size = sizes
    steps, layers, rank = 16, 2, 16
    low, wide = functools.partial(_meta, dtype=dtype), _meta
    forward = lstm.Products(dtype, precision)
    backward = lstm.Products(torch.float32, "tf32") if dtype == torch.float16 else forward
    layer = lstm.Layer(wide(4 * size, size), wide(4 * size, size), wide(4 * size), wide(4 * size))
    states = low(steps + 1, batch, size)
    trace = lstm.Trace(
        states, low(batch, size), low(batch, size), states, low(steps, batch, 4 * size)
    )
    carry, int32 = wide(batch, size), torch.int32
    barrier = GridBarrier(_meta(batch, dtype=int32), _meta(RECORD, dtype=int32), 2**21)
    lengths = _meta(batch, dtype=torch.int64) if kind else None
    tiles = lstm.window_tiles(batch, size, forward.width, False, machine)
    yield Specimen(
        f"{name} forward",
        lstm.plan_forward(layer, trace.c, trace, lengths, carry, barrier, True, tiles, forward)[-1],
        spills,
        in_flight=4 if tiles.persistent else 0,  # the next step's gates
    )
    ends = None
    if kind is not None:
        features = 2 * layers * size
        shape = {"dense": (features,), "lowrank": (rank,), "diagonal": ()}[kind]
        ends = lstm.Ends(
            low(layers, batch, size),
            low(layers, batch, size),
            wide(features, *shape),
            wide(rank, features) if kind == "lowrank" else None,
            wide(features),
            _meta(batch, dtype=torch.bool),
            0.1,
            rank if kind == "lowrank" else 0,
            layers,
        )
    made = lstm.Gradients(_meta(steps, batch, 4 * size, dtype=backward.dtype), trace.h, trace.c)
    tiles = lstm.window_tiles(batch, size, backward.width, True, machine)
    launches = lstm.plan_backward(
        layer, (low(steps, batch, size), trace.h, None), trace, lengths, made, ends, kind or "none",
        1, (carry, carry), carry, barrier, tiles, backward,
    )  # fmt: skip
    # Gates, cell states around the step, and what comes from above.
    yield Specimen(f"{name} backward", launches[-1], spills, in_flight=7 if tiles.persistent else 0)
    if ends is not None and not tiles.persistent:
        products = kind != "diagonal"
        yield Specimen(f"{name} ends", launches[0], spills, products, products)


def lstm_specimens(architecture: int) -> Iterator[Specimen]:
    """Yield what the rules of thumb choose, over sizes, dtypes and synthesizers; all of them for
    Hopper alone."""
    machine, all_cases = lstm.MACHINES[architecture], architecture == 90
    half, full = torch.bfloat16, torch.float32
    # 16 bytes: what the assembler puts aside around the loop over steps.
    cases: list[tuple[str, tuple[int, int], torch.dtype, str, str | None, lstm.Machine, int]] = [
        ("16x1024 bf16", (16, 1024), half, "tf32", None, machine, 16),
        ("32x256 fp32 dense", (32, 256), full, "tf32x3", "dense", machine, 16),
        ("64x2048 bf16 diagonal", (64, 2048), half, "tf32", "diagonal", machine, 0),
        ("64x512 bf16 lowrank", (64, 512), half, "tf32", "lowrank", machine, 16),
        ("32x512 fp16", (32, 512), torch.float16, "tf32", None, machine, 16),
        ("64x1024 fp32", (64, 1024), full, "tf32x3", None, machine, 0),
    ]
    for case in cases if all_cases else cases[:3]:
        yield from _window_specimens(*case)
    batch, size = 64, 512
    kinds = [("bf16", half, "tf32"), ("fp32", full, "tf32x3")]
    for name, dtype, precision in kinds if all_cases else kinds[:1]:
        low = functools.partial(_meta, dtype=dtype)
        layer = lstm.Layer(_meta(4 * size, size), _meta(4 * size, size), _meta(4 * size), None)
        state, gates = low(batch, size), low(batch, 4 * size)
        products = lstm.Products(dtype, precision)
        tiles = lstm.step_tiles(batch, size, products.width, machine)
        (launch,) = lstm.plan_cell_forward(
            state, state, state, layer, state, state, gates, tiles, products
        )
        yield Specimen(f"cell {batch}x{size} {name} forward", launch)
        (launch,) = lstm.plan_cell_backward(
            state, state, state, state, gates, layer.weight_hh, gates, state, tiles, products
        )
        yield Specimen(f"cell {batch}x{size} {name} backward", launch, 0, False, False)
        count = 16 * batch
        rows = lstm.Rows(low(count, size), low(count, size), low(count, 4 * size))
        hyper = _meta(7, dtype=torch.float64)
        workspace = lstm.UpdateWorkspace.allocate(1, hyper)
        record = _meta(RECORD, dtype=torch.int32)
        for kind, second in (("sgd", lstm.Layer(None, None)), ("adamw", layer)):
            rule = lstm.Rule(kind, False, hyper, layer, second, (True, True, True, False))
            tiles = lstm.update_tiles(size, machine)
            launches = lstm.plan_update((rows,), (layer,), rule, workspace, record, tiles, products)
            if kind == "sgd":
                yield Specimen(f"measure {name}", launches[0], 0, False)
                yield Specimen(f"update trial {name}", launches[1])
            yield Specimen(f"update {kind} {name}", launches[2])


# ---------------------------------------------------------------------------------------------
# A synthesizer


def _synthesizer(
    rows: int,
    outputs: int,
    dtype: torch.dtype,
    problem: synthesizer.Problem,
    architecture: int,
    tabled: bool,
) -> list[Launch]:
    """Plan a prediction, or a step of training, with ten classes or a table [10, O], rank 16."""
    rank = 16 if problem.source == "lowrank" else 0
    shapes = {"dense": (outputs, outputs), "lowrank": (outputs, rank), "diagonal": (outputs,)}
    slots: dict[str, tuple[int, ...]] = {"weight": shapes[problem.source]}
    if rank:
        slots["down"] = (rank, outputs)
    slots |= {"context": () if tabled else (outputs, 10), "bias": (outputs,)}
    if problem.training:
        problem = problem._replace(trainable=(True, rank > 0, True, True))
    kept = {"sgd": ("first",), "adam": ("first", "second")}.get(problem.rule, ())
    moments = {
        f"{moment}_{name}": _meta(*shape) for moment in kept for name, shape in slots.items()
    }
    t = synthesizer.Tensors(
        h=_meta(rows, outputs, dtype=dtype),
        synthesizer_weight=_meta(*slots["weight"]),
        down=_meta(rank, outputs) if rank else None,
        context_weight=_meta(*slots["context"]),
        synthesizer_bias=_meta(outputs),
        table=_meta(10, outputs, dtype=dtype) if tabled else None,
        labels=_meta(rows, dtype=torch.int64),
        scaled=_meta(rows, outputs),
        reduced=_meta(rows, rank) if rank else None,
        grad_h=_meta(rows, outputs, dtype=dtype) if problem.training else None,
        hyper=_meta(7, dtype=torch.float64) if problem.training else None,
        statistics=_meta(5, dtype=torch.float64) if problem.training else None,
        **moments,
    )
    tiles = synthesizer.default_tiles(rows, outputs, dtype, architecture)
    t = synthesizer.workspace(t, problem, tiles, rank)
    if tiles.launches == "one":
        int32 = torch.int32
        t = t._replace(
            barrier=GridBarrier(_meta(1, dtype=int32), _meta(RECORD, dtype=int32), 2**21)
        )
    launches: list[Launch] = synthesizer.plan(t, problem, tiles, (rows, outputs, rank, 10), 132)
    return launches


def synthesizer_specimens(architecture: int) -> Iterator[Specimen]:
    """Yield what the rule of thumb chooses for a small and for a large layer."""
    predict = synthesizer.Problem("lowrank", False)
    dense = predict._replace(source="dense", precision="tf32")
    train = synthesizer.Problem("lowrank", True, 128.0, "sgd")
    bf16, fp32 = torch.bfloat16, torch.float32
    for name, rows, outputs, dtype, problem in (
        ("predict bf16", 128, 1024, bf16, predict),
        ("predict dense tf32", 128, 1024, fp32, dense),
        ("train bf16", 128, 1024, bf16, train),
        ("train dense adam bf16", 128, 1024, bf16, train._replace(source="dense", rule="adam")),
        ("train diagonal fp32", 128, 1024, fp32, train._replace(source="diagonal")),
        ("train tf32", 128, 1024, fp32, train._replace(precision="tf32")),
        ("predict table bf16", 128, 1024, bf16, predict),
        ("train table dense bf16", 128, 1024, bf16, train._replace(source="dense")),
        ("train table bf16", 128, 1024, bf16, train),
        ("train bf16", 4096, 4096, bf16, train),
    ):
        tabled = "table" in name
        for launch in _synthesizer(rows, outputs, dtype, problem, architecture, tabled):
            first = launch.arguments["FIRST"]
            whole = first != launch.arguments["LAST"]
            part = "" if whole else f" phase {first}"
            # 16 bytes: what the assembler puts aside around the products of one launch, and as many
            # again (on 80 and 100) around the rows that are gathered between them.
            spills = (32 if tabled else 16) if whole else 0
            yield Specimen(
                f"{name} {rows}x{outputs}{part}", launch, spills=spills,
                tensor_cores=problem.source != "diagonal" and first != synthesizer.REDUCE.value,
            )  # fmt: skip
