"""The operations of the registered ops, for PyTorch's ``FlopCounterMode``.

Counted as PyTorch counts: two for a multiply-add of a product, nothing for what goes element by
element.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch

Given = dict[str, Any]  # an op's arguments by name, the shape in place of a tensor


def show_to_counters() -> None:
    """Make the formulas known to every counter that runs, and to those made later.

    Called when a dispatch mode is seen: to import ``FlopCounterMode`` before (and triton with it)
    would cost half a second.
    """
    module: Any = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    made = _formulas()
    for op, formula in made.items():
        if op not in module.flop_registry:
            module.flop_registry[op] = module.shape_wrapper(formula)
    for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, module.FlopCounterMode):
            for op in made:
                counter.flop_registry.setdefault(op, module.flop_registry[op])


@functools.cache
def _formulas() -> dict[Any, Callable[..., int]]:
    counted: dict[str, Callable[[Given], int]] = {
        "linear_forward": _product,
        "linear_backward": lambda given: (
            _product(given) * (int(given["need_dx"]) + int(given["need_weight"]))
        ),
        "linear_update_": _product,
        "linear_cross_entropy": lambda given: _product(given, given["weight"]),
        "linear_step_": _step,
        "synthesizer_predict": _prediction,
        "synthesizer_gradients": _regression,
        "synthesizer_update_": _regression,
        "lstm_forward": lambda given: given["x"][0] * _gates(given, given["x"][1]),
        "lstm_backward": lambda given: given["x"][0] * _gates_backward(given, given["x"][1]),
        # Rows of input, hidden and delta a layer; the products of delta with the other two.
        "lstm_update_": lambda given: _gates(given, given["rows"][0][0]),
        "lstm_cell_forward": lambda given: _gates(given, given["x"][0]),
        "lstm_cell_backward": lambda given: _gates_backward(given, given["x"][0]),
    }
    ops = torch.ops.fused_dni
    return {getattr(ops, name): _named(getattr(ops, name), f) for name, f in counted.items()}


def _named(op: Any, formula: Callable[[Given], int]) -> Callable[..., int]:
    names = [argument.name for argument in op.default._schema.arguments]

    def counted(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return formula({**dict(zip(names, args, strict=False)), **kwargs})

    return counted


def _product(given: Given, weight: tuple[int, ...] | None = None) -> int:
    """Count the product of x [N, I] with weight [O, I], that of a layer if it is not given."""
    return 2 * int(given["x"][0]) * math.prod(weight or given["layer_weight"])


def _step(given: Given) -> int:
    rows, features = given["x"][0], given["layer_weight"][0]
    return _product(given) * (2 + int(given["need_dx"])) + _prediction(
        {**given, "h": (rows, features)}
    )


def _context(given: Given) -> int:
    """Count that of a dense context [N, K]; class indices are looked up, and of a cross-entropy
    probabilities are subtracted."""
    context, weight = given["context"], given["synthesizer_context_weight"]
    if context is None or weight is None or len(context) == 1 or len(weight) == 1:
        return 0
    return 2 * int(given["h"][0]) * math.prod(weight)


def _products(given: Given, of_weight: int) -> int:
    """Count products of a synthesizer's h with its weight, so many, and one with its down."""
    rows, weight, down = (given[n] for n in ("h", "synthesizer_weight", "synthesizer_down"))
    made = of_weight * math.prod(weight) if len(weight) == 2 else 0
    return 2 * int(rows[0]) * (made + (0 if down is None else math.prod(down)))


def _prediction(given: Given) -> int:
    return _products(given, 1) + _context(given)


def _regression(given: Given) -> int:
    """Count, of a low rank, the way back through the weight too, for the product for down."""
    return _products(given, 1 if given["synthesizer_down"] is None else 2) + _context(given)


def _weights(given: Given) -> list[tuple[int, ...]]:
    parameters = given.get("layers") or [given["layer_weight_ih"], given["layer_weight_hh"]]
    return [shape for shape in parameters if shape is not None and len(shape) == 2]


def _gates(given: Given, batch: int) -> int:
    return 2 * int(batch) * sum(math.prod(shape) for shape in _weights(given))


def _gates_backward(given: Given, batch: int) -> int:
    """Count those to the state and the layer below by each weight; x of the first layer on
    demand."""
    back = _gates(given, batch)
    made = back if given["need_weights"] else 0
    if not given["need_dx"]:
        back -= 2 * int(batch) * math.prod(_weights(given)[0])
    return made + back
