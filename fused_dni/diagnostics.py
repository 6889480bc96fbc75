"""How good the synthetic gradients are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fused_dni.functional import check
from fused_dni.modules.base import DecoupledModule, Phase, Predicted
from fused_dni.modules.recurrent import Recurrent
from fused_dni.ops.types import G_DOT_G, ROWS, S_DOT_G, S_DOT_S, SQUARED_ERROR


def diagnostics(
    model: nn.Module, closure: Callable[[], Tensor] | None = None, *, reset: bool = False
) -> dict[str, dict[str, float]]:
    """Say what the synthesizers of a model were trained on, and how well they predicted it.

    Args:
        model: a model with decoupled layers.
        closure: runs a forward in training mode and returns the loss. If given, it is run once
            with exact gradients everywhere, nothing being updated and no buffer left changed, and
            each prediction is compared with the *true* gradient of the whole net besides, where
            the layer's ``interface`` is.
        reset: start the running sums anew afterwards.

    Returns:
        By layer name: ``cosine`` and ``norm_ratio`` (``|s| / |g|``) of the synthetic gradient s
        against the gradient g that arrived (which may be bootstrapped), over all elements since the
        last reset; ``synthesizer_loss``, the mean over rows of the squared error of kappa * g;
        ``target_unit``, in which the synthesizer predicts that;
        ``targets``, the rows trained on; ``missed_targets``, the steps with targets in which, as a
        ``Schedule`` saw, nothing came to learn from (not of an LSTM);
        ``skipped_updates`` and ``skipped_synthesizer_updates``;
        ``auxiliary_cosine`` and ``auxiliary_norm_ratio`` of an auxiliary head against the synthetic
        gradient that it predicts; of an LSTM ``windows``, those with a prediction at their end, and
        ``windows_continued``, those that continued a state of its own (compiled code counts
        neither); with a closure ``true_cosine`` and ``true_norm_ratio``. NaN where
        there is nothing yet. Layers without a synthesizer predict nothing and are not in it: where
        all are such, as of a baseline, it is empty.

    Raises:
        TypeError: ``model`` is no module, ``closure`` no function or returns no tensor.
        ValueError: the model has no decoupled layers at all.
    """
    check.module("model", model)
    if closure is not None and not callable(closure):
        raise TypeError(f"closure must be None or a function, got {type(closure).__name__}")
    layers = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, DecoupledModule) and m.synthesizer is not None
    }
    if not layers:
        if not any(isinstance(m, DecoupledModule) for m in model.modules()):
            raise ValueError("model has no decoupled layers (see fused_dni.convert)")
        return {}
    out = {name: _sums(layer) for name, layer in layers.items()}
    if closure is not None:
        for name, found in _against_truth(model, layers, closure).items():
            out[name].update(found)
    if reset:
        for layer in layers.values():
            layer.statistics.zero_()
            layer.missed_targets = 0
            if isinstance(layer, Recurrent):
                layer.auxiliary_statistics.zero_()
    return out


def _ratio(a: float, b: float) -> float:
    return a / b if b else float("nan")


def _agreement(s: list[float]) -> tuple[float, float]:
    """Cosine and ratio of norms from the sums."""
    cosine = _ratio(s[S_DOT_G], (s[S_DOT_S] * s[G_DOT_G]) ** 0.5)
    return cosine, _ratio(s[S_DOT_S] ** 0.5, s[G_DOT_G] ** 0.5)


def _sums(layer: DecoupledModule) -> dict[str, float]:
    s = layer.statistics.tolist()
    rows = s[ROWS]
    head: dict[str, float] = {}
    if isinstance(layer, Recurrent) and layer.auxiliary_head is not None:
        found = _agreement(layer.auxiliary_statistics.tolist())
        head = dict(zip(("auxiliary_cosine", "auxiliary_norm_ratio"), found, strict=True))
    if isinstance(layer, Recurrent):
        layer.warn_of_norm(s)
        head |= layer.windows()
    else:
        head["missed_targets"] = float(layer.missed_targets)
    cosine, norm_ratio = _agreement(s)
    return {
        "cosine": cosine,
        "norm_ratio": norm_ratio,
        **head,
        "synthesizer_loss": _ratio(s[SQUARED_ERROR] * layer.unit**2, rows),
        "target_unit": layer.unit,
        "targets": rows,
        "skipped_updates": float(layer.skipped_updates),
        "skipped_synthesizer_updates": float(
            layer.synthesizer_update.skipped if layer.synthesizer_update is not None else 0
        ),
    }


def _against_truth(
    model: nn.Module, layers: dict[str, DecoupledModule], closure: Callable[[], Tensor]
) -> dict[str, dict[str, float]]:
    """Run ``closure`` with exact gradients and hold each prediction against its true gradient."""
    everyone = [m for m in model.modules() if isinstance(m, DecoupledModule)]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    grads = [(p, p.grad) for p in model.parameters()]
    recorded: dict[str, list[tuple[Tensor, Tensor]]] = {}
    before = [(m, m.phase) for m in everyone]

    def record(name: str) -> Callable[[Tensor, Predicted | None, float], None]:
        def probe(at: Tensor, predicted: Predicted | None, scale: float) -> None:
            assert predicted is not None
            at.retain_grad()
            recorded.setdefault(name, []).append((at, predicted.scaled / scale))

        return probe

    try:
        for module in everyone:
            module.phase = Phase(probe=_ignore)
        for name, layer in layers.items():
            layer.phase = Phase(probe=record(name))
        for p, _ in grads:
            p.grad = None
        with torch.random.fork_rng():
            loss = closure()
            if not isinstance(loss, Tensor):
                raise TypeError(
                    f"closure must return the loss, a torch.Tensor [], got {type(loss).__name__}"
                )
            loss.backward()
    finally:
        for module, phase in before:
            module.phase = phase
        for p, grad in grads:
            p.grad = grad
        with torch.no_grad():
            for name, b in model.named_buffers():
                b.copy_(buffers[name])
    out = {}
    for name, uses in recorded.items():
        pairs = [(s, at.grad) for at, s in uses if at.grad is not None]
        if not pairs:
            continue
        s, g = (torch.cat([t.double().flatten() for t in ts]) for ts in zip(*pairs, strict=True))
        out[name] = {
            "true_cosine": _ratio(float(s @ g), float(s.norm() * g.norm())),
            "true_norm_ratio": _ratio(float(s.norm()), float(g.norm())),
        }
    return out


def _ignore(at: Tensor, predicted: Predicted | None, scale: float) -> None:
    """Stand in for the probe of layers without a synthesizer."""
