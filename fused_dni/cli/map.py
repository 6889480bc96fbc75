"""``map``: the break-even map."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fused_dni.cli.arguments import device_named, refuse_unwritable, rule
from fused_dni.cli.command import PROGRAM, Measuring
from fused_dni.cli.output import OutFile, kept_in, out_file, say, warn
from fused_dni.measure.options import (
    DEVICE,
    DTYPES,
    EVERY,
    FILE,
    FOLDER,
    INTERFACES,
    KS,
    MAP_SECONDS,
    SECONDS,
    TEXT,
    UPDATE,
    one_of,
    option,
    whole,
)

if TYPE_CHECKING:
    from fused_dni.report import Result


@dataclass(kw_only=True)
class Map(Measuring):
    """Measure one layer (Linear, BatchNorm, ReLU) inside a network by backprop and by DNI over a
    grid of batches, widths and synthesizers, and keep the map in a file. The same command goes on
    where it was stopped; points of other machines, versions or settings in the file are kept
    apart."""

    name = "map"
    summary = "the break-even map: batch x width x k x synthesizer"
    epilog = """examples:
  {program} map
  {program} map --batches 32 128 --widths 256 512 --synthesizers rank4 --out small.json
  {program} map --merge here.json there.json --out both.json
  {program} report map.json -o map.html"""

    batches: tuple[int, ...] = option((16, 64, 256), whole(2), "rows", group="grid")
    widths: tuple[int, ...] = option((64, 128, 256, 512, 1024), whole(1), "features")
    synthesizers: tuple[str, ...] = option(
        ("dense", "rank16", "diagonal"), TEXT, "dense, rankR or diagonal"
    )
    interfaces: tuple[str, ...] = option(("output",), one_of(INTERFACES), "output, preactivation")
    target_every: tuple[int, ...] = option(
        tuple(k or 0 for k in KS), EVERY, "targets on every K-th step", group="method"
    )
    update: str = option("sgd", UPDATE, "update rule")
    dtype: str = option("float32", one_of(DTYPES), "of activations and parameters")
    device: str = option("cpu", DEVICE, "cpu or cuda")
    backend: str | None = option(None, TEXT, "force a backend of our kernels")
    seconds: float = option(MAP_SECONDS, SECONDS, "of timing, for each point")
    out: str = option("map.json", FILE, "the map", group="output")
    merge: tuple[str, ...] | None = option(
        None, FILE, "measure nothing: join these maps into --out", several="+"
    )
    figures: str | None = option(None, FOLDER, "write the heat maps into DIR, as SVG")

    def run(self, command: str) -> int:
        from fused_dni.measure.map import merge
        from fused_dni.report import as_text, blocks_of, load
        from fused_dni.report.files import as_json

        out = out_file(self, needed=True)
        if self.figures is not None:
            refuse_unwritable(self.figures)
        if self.merge is not None:
            found = merge([load(name, "map") for name in self.merge])
            out.write(as_json(found))
        else:
            found = self._measured(out, command)
        say(as_json(found).rstrip() if self.json else as_text(blocks_of(found)))
        out.finish()
        if self.figures is not None:
            _draw(found, Path(self.figures))
        return 0

    def _measured(self, out: OutFile, command: str) -> Result:
        import torch

        from fused_dni.measure.map import Settings, make_grid
        from fused_dni.measure.map.sweep import sweep
        from fused_dni.ops import registry

        points = make_grid(self.batches, self.widths, self.synthesizers, self.interfaces)
        if self.backend is not None:
            registry.get(self.backend)
        settings = Settings(
            device=device_named(self.device),
            dtype=getattr(torch, self.dtype),
            update=rule(self.update),
            ks=tuple(k or None for k in self.target_every),
            backend=self.backend,
            seconds=self.seconds,
        )
        with self.progress() as progress, kept_in(out, self.json) as keep:
            return sweep(
                points,
                settings,
                Path(self.out),
                progress=progress.update,
                command=command,
                keep=keep,
            )


def _draw(report: Result, folder: Path) -> None:
    """Write the figures; without matplotlib, say what to install and leave it at that."""
    from fused_dni.report import Figure, blocks_of

    try:
        for block in blocks_of(report):
            if isinstance(block, Figure):
                block.save(folder / f"{block.name}.svg")
    except ModuleNotFoundError as error:
        warn(f"{PROGRAM}: no figures: pip install {error.name}")
