"""``train pipeline``: a network over several processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fused_dni.cli.arguments import refuse_unwritable
from fused_dni.cli.command import UsageError
from fused_dni.cli.experiment import OnImages
from fused_dni.cli.output import out_file, say_report
from fused_dni.experiments.settings import Staged
from fused_dni.measure.options import FILE, FOLDER, option, whole


@dataclass(kw_only=True)
class TrainPipeline(OnImages):
    """Train the network of Jaderberg et al. 2016 with its layers shared out over processes, by each
    way of getting a gradient to a stage: waiting for it, using it when it comes, local losses,
    predicting it; and write a report: steps a second, error, age of gradients, what each stage
    waits for."""

    name = "train pipeline"
    summary = "train over several processes in which no stage waits for a backward"
    settings = Staged
    epilog = """To measure what a delay between the stages does to the number of steps:
{program} simulate; to the error: {program} delay. Your own model, and several hosts:
fused_dni.distributed (docs/distributed.md)."""

    out: str | None = option("pipeline.json", FILE, "the report", group="output")
    #: Each stage has one.
    threads: None = None
    checkpoint: str | None = option(
        None, FOLDER, "keep the state of the run in DIR, and go on from what is there",
        group="checkpoints",
    )  # fmt: skip
    restarts: int = option(0, whole(0), "how often all processes are started anew when one dies")

    def check(self) -> None:
        super().check()
        if self.restarts and self.checkpoint is None:
            raise UsageError("--restarts needs --checkpoint DIR, to go on from")

    def run(self, command: str) -> int:
        import tempfile

        from fused_dni.experiments.staged import train

        out = out_file(self)
        settings = self.chosen(folder=self.data)
        if self.checkpoint is not None:
            refuse_unwritable(self.checkpoint)
        with tempfile.TemporaryDirectory() as temporary:
            report = train(
                settings,
                str(Path(self.checkpoint or temporary).absolute()),
                restarts=self.restarts,
                progress=self.progress(),
                command=command,
            )
        say_report(report, self.json, out)
        return 0
