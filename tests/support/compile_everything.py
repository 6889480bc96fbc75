"""Every launch that the Triton backend makes over tables of options, through Triton's front end.

    python tests/support/compile_everything.py OUT.json

The interpreter takes what the compiler refuses: a variable that changes its shape, a reduction of
a scalar. Here no kernel runs and no machine code is made; what is checked is that the compiler
takes each kernel with each set of options. Must not run under TRITON_INTERPRET. What it took in an
earlier run it takes again: kept by Triton's own key of source, types, constants and options.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import strategies
import torch
import triton
from fused_dni.kernels import aot, lstm
from triton import knobs
from triton.compiler.compiler import ir, make_backend

from fused_dni.backends.triton import backend as linear_backend
from fused_dni.backends.triton import lstm as lstm_backend

ARCHITECTURE = 90

_failures: dict[str, str] = {}
_seen: set[str] = set()
_row = ""


class _Checked:
    """In the place of a compiled kernel."""

    def result(self) -> _Checked:
        return self


def front_end(src: Any, target: Any, options: dict[str, Any], **_: Any) -> _Checked:
    """As ``triton.compile``, as far as the first representation."""
    backend = make_backend(target)
    parsed = backend.parse_options(dict(options))
    key = f"{triton.__version__} {src.hash()} {backend.hash()} {parsed.hash()}"
    taken = Path(knobs.cache.dir) / "taken" / hashlib.sha256(key.encode()).hexdigest()
    if taken.exists():
        return _Checked()
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module_map = backend.get_module_map()
    src.make_ir(target, parsed, backend.get_codegen_implementation(parsed), module_map, context)
    taken.parent.mkdir(parents=True, exist_ok=True)
    taken.touch()
    return _Checked()


def described(arguments: dict[str, Any]) -> dict[str, Any]:
    """What the compiler distinguishes; constants are those in capitals."""

    def type_of(v: Any) -> Any:
        if isinstance(v, torch.Tensor):
            return v.dtype
        if isinstance(v, tuple):
            return tuple(map(type_of, v))
        return None if v is None else type(v)

    return {name: v if name.isupper() else type_of(v) for name, v in arguments.items()}


def check(launches: list[Any], _device: Any) -> None:
    """In the place of running them."""
    for launch in launches:
        key = launch.kernel.__name__ + str(described(launch.arguments))
        if key in _seen:
            continue
        _seen.add(key)
        launch.kernel.compile = front_end
        try:
            aot.compile_launch(launch, ARCHITECTURE)
        except Exception as error:
            reason = f"{launch.kernel.__name__}: {error.__cause__ or error}"[-600:]
            _failures.setdefault(reason, _row)


def main(out: Path) -> None:
    """Run the ops over the tables; write how many launches there were and which failed."""
    global _row
    replaced: dict[str, Any] = {
        "architecture": lambda _: ARCHITECTURE,
        "resident": lambda _: 132,
        "run": check,
        "machine": lambda _: lstm.MACHINES[ARCHITECTURE],
    }
    for module in (linear_backend, lstm_backend):
        for name, value in replaced.items():
            if hasattr(module, name):
                setattr(module, name, value)
    # What no kernel fills is zero, and as such in order.
    torch.empty, torch.empty_like = torch.zeros, torch.zeros_like  # type: ignore[assignment]
    torch.Tensor.new_empty = torch.Tensor.new_zeros  # type: ignore[method-assign]
    backend = linear_backend.TritonBackend()
    half, full = torch.bfloat16, torch.float32
    for i, row in enumerate(strategies.pairwise(strategies.AFFINE_OPTIONS)):
        _row = str(row)
        dtypes = [(full, full), (half, full)][i % 2]
        case = strategies.make_case((48, 64, 40, 16, 10), row, 0, *dtypes)
        strategies.run_step(backend, case)
        if i % 3 == 0:
            strategies.run_parts(backend, case.to(*dtypes))
        if i % 8 == 0:  # bfloat16 parameters, rounded at random
            case = strategies.make_case((48, 64, 40, 16, 10), row, 0, half, half)
            case.rule = replace(case.rule, stochastic_rounding=True)
            strategies.run_step(backend, case)
    # And what is given may be: large weights take seconds to draw.
    torch.randn = lambda *size, generator, **of: torch.zeros(*size, **of)
    for i, row in enumerate(strategies.pairwise(strategies.LSTM_OPTIONS)[::2]):
        _row = str(row)
        # Recurrent weights that stay on chip, and such that do not.
        size = 48 if i % 2 else 2048
        strategies.run_window(backend, strategies.make_lstm((3, 5, 16, size, 2), row, i, full))
    for i, row in enumerate(strategies.pairwise(strategies.CLOSE_OPTIONS)[::2]):
        _row = str(row)
        case = strategies.make_closing((3, 5, 16, 48, 2), row, i, full)
        strategies.run_close(backend, case)
    _row = "cell"
    row = {**strategies.pairwise(strategies.LSTM_OPTIONS)[0], "lengths": False, "dropout": False}
    strategies.run_cell(backend, strategies.make_lstm((1, 5, 16, 48, 1), row, 0, full))
    out.write_text(json.dumps({"launches": len(_seen), "failures": _failures}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
