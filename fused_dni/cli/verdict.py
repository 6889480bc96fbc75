"""``verdict`` and ``verdict lstm``."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING

from fused_dni.cli.arguments import (
    SEGMENTS,
    device_named,
    factory,
    no_factory,
    refuse,
    refuse_format,
    refuse_number,
    rule,
)
from fused_dni.cli.command import Measuring, UsageError, flags
from fused_dni.cli.output import OutFile, out_file, say_verdict
from fused_dni.measure.options import (
    ACTIVATIONS,
    DEVICE,
    DTYPES,
    EVERY,
    FILE,
    INTERFACES,
    KS,
    NORMALIZATIONS,
    SECONDS,
    SHAPE,
    TEXT,
    UPDATE,
    VERDICT_SECONDS,
    Kind,
    one_of,
    option,
    whole,
)

if TYPE_CHECKING:
    from torch import nn

    from fused_dni.measure.verdict.segments import Segment


def _segment_or_factory(name: str, value: str, given: str) -> None:
    if value not in SEGMENTS and ":" not in value:
        raise no_factory(given)


@dataclass(kw_only=True)
class Verdict(Measuring):
    """Time a training step by stock backprop, compiled backprop, backprop on our kernels and DNI
    (targets on every k-th step, by interface and synthesizer), interleaved, with the floor beside
    them; then the parts of a step."""

    name = "verdict"
    summary = "what backprop and DNI cost for a layer or network, and where the break-even is"
    epilog = """examples:
  {program} verdict linear --in 1024 --batch 128 --normalization batch --activation relu
  {program} verdict mlp --width 256 --depth 4 --batch 64 --classes 10
  {program} verdict block --depth 8 --synthesizers dense rank16
  {program} verdict transformer --width 256 --tokens 128 --batch 4
  {program} verdict package.module:factory --sample 64x784
  {program} verdict lstm --hidden 256 --batch 32 --window 8 --long 40
  {program} verdict top package.module:factory --race 20

A factory is called without arguments and returns a module, or (module, sample)."""

    what: str = option(
        MISSING,
        Kind(_segment_or_factory, metavar="SEGMENT"),
        "linear, mlp, block, conv, transformer, lstm, top or package.module:factory",
        place=True,
    )
    inputs: int | None = option(None, whole(1), "input features", flag="in", group="segment")
    outputs: int | None = option(None, whole(1), "linear: output features")
    width: int | None = option(None, whole(1), "units, or channels, of a layer")
    depth: int | None = option(None, whole(1), "mlp, block, conv: layers")
    size: int | None = option(None, whole(1), "conv: side of the maps")
    tokens: int | None = option(None, whole(1), "transformer: of a sequence")
    heads: int | None = option(None, whole(1), "transformer: of the attention")
    batch: int | None = option(None, whole(1), "rows of a batch")
    classes: int | None = option(
        None,
        whole(1),
        "that synthesizers are conditioned on (10; for a factory none); mlp: outputs too",
    )
    unconditional: bool = option(False, help="no conditioning on classes")
    normalization: str | None = option(None, one_of(NORMALIZATIONS), "(batch)")
    activation: str | None = option(None, one_of(ACTIVATIONS), "(relu)")
    sample: tuple[int, ...] | None = option(None, SHAPE, "factory: shape of a batch")
    dtype: str = option("float32", one_of(DTYPES), "of activations and parameters")
    device: str = option("cpu", DEVICE, "cpu or cuda")
    update: str = option("sgd", UPDATE, "update rule", group="method")
    interface: tuple[str, ...] | None = option(
        None,
        one_of(INTERFACES),
        "output, preactivation: where the gradient is predicted (all that differ)",
        several="+",
    )
    synthesizers: tuple[str, ...] | None = option(
        None, TEXT, "dense, rank16 or another rank, diagonal, conv (all that fit)", several="+"
    )
    rank: int | None = option(None, whole(0), "one synthesizer alone, of this rank; 0: dense")
    target_every: tuple[int, ...] = option(
        tuple(k or 0 for k in KS), EVERY, "targets on every K-th step"
    )
    backend: str | None = option(None, TEXT, "force a backend of our kernels")
    no_compile: bool = option(False, help="leave compiled backprop out")
    no_parts: bool = option(False, help="whole steps alone, not their parts")
    seconds: float = option(
        VERDICT_SECONDS, SECONDS, "of timing, all together; thrice that where times scatter"
    )
    plot: str | None = option(None, FILE, "draw it into an image file", group="output")

    def check(self) -> None:
        refuse_number(self.out)
        if self.rank is not None and self.synthesizers is not None:
            raise UsageError("give --rank or --synthesizers, not both")

    def run(self, command: str) -> int:
        import torch

        from fused_dni.measure.verdict import verdict
        from fused_dni.report.kinds import verdict as reports

        out, plot = out_file(self), OutFile("--plot", self.plot)
        refuse_format(plot.path)
        dtype = getattr(torch, self.dtype)
        device = device_named(self.device)
        segment = self._segment()
        try:
            module = segment.module.to(device=device, dtype=dtype)
        except (RuntimeError, TypeError) as error:
            raise UsageError(
                f"cannot take the module to {self.device}, {self.dtype}: {error}"
            ) from None
        target = None if segment.target is None else segment.target.to(device)
        synthesizers = "default" if self.rank is not None else self.synthesizers or "all"
        with self.progress() as progress:
            found = verdict(
                module,
                segment.sample.to(device=device, dtype=dtype),
                target=target,
                update=rule(self.update),
                target_every=[k or None for k in self.target_every],
                interface=self.interface or "all",
                synthesizer=synthesizers,
                context_features=0 if self.unconditional else segment.classes,
                rank=self.rank,
                seconds=self.seconds,
                parts=not self.no_parts,
                compile=not self.no_compile,
                backend=self.backend,
                title=segment.title or None,
                progress=progress.update,
            )
        found.facts["command"] = command
        say_verdict(found, self.json, out, plot, reports.over_k(found.report()))
        return 0

    def _segment(self) -> Segment:
        """Make what is measured."""
        from fused_dni.measure.verdict import segments

        given = {name: getattr(self, name) for name in segments.options()}
        named = flags(self)
        if self.what in segments.SEGMENTS:
            refuse(self.what, {"sample": self.sample})
            return segments.make(self.what, given)
        refuse(self.what, {named[name]: v for name, v in given.items() if name != "classes"})
        module, sample, _ = factory(self.what, self.sample)
        return segments.Segment(module, sample, None, "", self.classes or 0)


@dataclass(kw_only=True)
class VerdictLSTM(Measuring):
    """Time an LSTM by DNI at window T, by truncated backprop at T, and by backprop at the longer
    window T2 that reaches the same quality, and take its peak memory: per time step of the
    sequence, interleaved, with the floor beside them. Which T2 that is, `fused-dni train charlm`
    measures."""

    name = "verdict lstm"
    summary = "what an LSTM costs by DNI at a window and by backprop at a longer one"
    epilog = "example: {program} verdict lstm --hidden 256 --batch 32 --window 8 --long 40"

    input: int | None = option(None, whole(1), "input features (as --hidden)", group="shape")
    hidden: int = option(256, whole(1), "units")
    layers: int = option(1, whole(1), "of the LSTM")
    batch: int = option(32, whole(1), "rows")
    window: int = option(8, whole(1), "steps of a window, T")
    long: int | None = option(None, whole(2), "those of the longer one, T2 (5 times T)")
    dtype: str = option("float32", one_of(DTYPES[:2]), "of activations and parameters")
    device: str = option("cpu", DEVICE, "cpu or cuda")
    update: str = option("adam", UPDATE, "update rule", group="method")
    rank: int | None = option(None, whole(0), "of the synthesizer; 0: dense (16)")
    auxiliary: bool = option(False, help="DNI with the auxiliary head")
    backend: str | None = option(None, TEXT, "force a backend of our kernels")
    seconds: float = option(VERDICT_SECONDS, SECONDS, "of timing, all together")

    def run(self, command: str) -> int:
        import torch

        import fused_dni as fd

        out = out_file(self)
        device = device_named(self.device)
        factory = {"device": device, "dtype": getattr(torch, self.dtype)}
        inputs = self.input or self.hidden
        features = 2 * self.layers * self.hidden
        synthesizer: nn.Module | str = "default"
        if self.rank is not None:
            low = min(self.rank, features) or None
            synthesizer = fd.LinearSynthesizer(features, low, **factory)
        lstm = fd.FusedDNILSTM(
            inputs,
            self.hidden,
            self.layers,
            synthesizer=synthesizer,
            auxiliary=self.auxiliary,
            backend=self.backend,
            **factory,
        )
        sample = torch.randn(
            self.window, self.batch, inputs, generator=torch.Generator().manual_seed(0)
        ).to(**factory)
        with self.progress() as progress:
            found = fd.verdict_lstm(
                lstm,
                sample,
                long=self.long,
                update=rule(self.update),
                seconds=self.seconds,
                progress=progress.update,
            )
        found.facts["command"] = command
        say_verdict(found, self.json, out)
        return 0
