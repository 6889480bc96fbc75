"""``tune``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Any

from fused_dni.cli.arguments import device_named, refuse, refuse_number, rule
from fused_dni.cli.command import Printing, UsageError
from fused_dni.cli.output import out_file, say
from fused_dni.measure.options import (
    ACTIVATIONS,
    DEVICE,
    DTYPES,
    NORMALIZATIONS,
    SECONDS,
    TEXT,
    UPDATE,
    one_of,
    option,
    whole,
)
from fused_dni.report import text

if TYPE_CHECKING:
    from fused_dni.ops.types import Backend


@dataclass(kw_only=True)
class Tune(Printing):
    """Time every op of a layer on scratch tensors with the tiles that come into question, on this
    GPU, then the CUDA and Triton backends on the layer's step or window, and keep the fastest for
    later processes: in $FUSED_DNI_CACHE, or fused_dni under the user's cache. Tiles of powers of
    two serve all shapes that round up to them, a backend's times those within a factor of four."""

    name = "tune"
    summary = "measure tiles of the Triton kernels and the backends for a shape, keep the fastest"
    epilog = """examples:
  {program} tune linear --batch 128 --in 1024 --outputs 1024
  {program} tune lstm --batch 16 --in 256 --outputs 256 --window 32 --dtype float32"""

    what: str = option(MISSING, one_of(("linear", "lstm")), "which layer", place=True)
    batch: int = option(128, whole(2), "rows", group="shape")
    inputs: int = option(1024, whole(1), "input features", flag="in")
    outputs: int | None = option(None, whole(1), "units (as --in)")
    dtype: str = option("bfloat16", one_of(DTYPES), "of x")
    device: str = option("cuda", DEVICE, "cuda[:N]")
    update: str = option("sgd", UPDATE, "update rule", group="layer")
    normalization: str | None = option(None, one_of(NORMALIZATIONS), "linear: (batch)")
    activation: str | None = option(None, one_of(ACTIVATIONS), "linear: (relu)")
    rank: int | None = option(None, whole(0), "linear: of the synthesizer; 0: dense (16)")
    classes: int | None = option(None, whole(0), "linear: that it is conditioned on (10)")
    window: int | None = option(None, whole(1), "lstm: steps (32)")
    ops: tuple[str, ...] | None = option(
        None, TEXT, "these alone, by their kernels' names (all)", several="+"
    )
    seconds: float = option(1.0, SECONDS, "of timing, for each op", group="output")

    def check(self) -> None:
        refuse_number(self.out)

    def run(self, command: str) -> int:
        import torch

        from fused_dni.measure import tune
        from fused_dni.ops import registry
        from fused_dni.ops.types import LinearConfig

        others = ("window",) if self.what == "linear" else ("normalization", "activation", "rank")
        refuse(self.what, {name: getattr(self, name) for name in others})
        out = out_file(self)
        kind = tune.LSTMScratch if self.what == "lstm" else tune.LinearScratch
        known: Sequence[str] = kind.ops
        ops = self.ops or known
        for op in ops:
            if op not in known:
                raise UsageError(text.unknown("op", op, known))
        device = device_named(self.device)
        if self.device == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        dtype = getattr(torch, self.dtype)
        like = torch.empty(0, device=device)
        triton = registry.resolve("triton", like.to(dtype), like)
        update = type(rule(self.update))
        outputs = self.outputs or self.inputs

        def make(backend: Backend) -> tune.LinearScratch | tune.LSTMScratch:
            if self.what == "lstm":
                shape = (self.window or 32, self.batch, self.inputs, outputs)
                return tune.LSTMScratch(backend, shape, dtype, device, update)
            norm = self.normalization or "batch"
            config = LinearConfig(None if norm == "none" else norm, self.activation or "relu")
            rank = 16 if self.rank is None else self.rank
            classes = 10 if self.classes is None else self.classes
            sizes = (self.batch, self.inputs, outputs)
            return tune.LinearScratch(backend, sizes, dtype, device, config, update, rank, classes)

        progress = self.progress()
        limits: dict[str, Any] = {"seconds": self.seconds, "progress": progress.update}
        found: list[tune.Tuned] = []
        ranked: tune.Ranked | None = None
        with progress:
            for tuned in tune.tune(lambda: make(triton), ops, device, **limits):
                found.append(tuned)
                if not self.json:
                    say(tuned.table(), end="\n\n")
            if set(kind.parts) <= set(ops):  # with their best tiles
                ranked = tune.rank(make, device, **limits)
                if not self.json:
                    say(ranked.table(), end="\n\n")
        report = tune.report(found, ranked, device)
        said = json.dumps(report, indent=1)
        out.write(f"{said}\n")
        say(said if self.json else report["kept in"])
        out.finish()
        return 0
