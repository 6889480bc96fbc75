"""``train``, ``train charlm``, ``copy``, ``repeat-copy``, ``rows`` and ``demo``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fused_dni.cli.command import PROGRAM, Measuring, UsageError
from fused_dni.cli.experiment import Checkpointed, OnImages
from fused_dni.cli.output import say
from fused_dni.experiments.settings import TASKS, Recurrent, Training
from fused_dni.measure.options import FOLDER, PATH, SECONDS, option

if TYPE_CHECKING:
    from fused_dni.experiments.characters import Text as Characters
    from fused_dni.experiments.data import Dataset
    from fused_dni.measure.verdict import Verdict
    from fused_dni.report.blocks import Block
    from fused_dni.report.kinds.train import Outcome
    from fused_dni.report.progress import Progress
    from fused_dni.report.schema import Result


@dataclass(kw_only=True)
class _OfThePaper(OnImages, Checkpointed):
    """Train the paper's network: what ``train`` and ``demo`` share."""

    settings = Training
    kind = "train"

    @property
    def folder(self) -> str:
        """Where the report goes."""
        return self.out or f"runs/{self.dataset}"

    def train(self, split_seconds: float | None) -> tuple[Outcome, Training, Dataset]:
        """Train, after a look at all that may be wrong, and measure the parts of a step."""
        from fused_dni.experiments import train

        settings: Training = self.chosen()
        self.refuse_folders(self.folder)
        progress = self.progress()
        dataset = self.load(progress, held_out=settings.held_out)
        progress.line(
            f"{dataset.name}: {len(dataset.train.labels)} images to train on, "
            f"{len(dataset.test.labels)} to test on; {', '.join(settings.runs())}"
        )
        outcome = train.train(
            settings,
            dataset,
            checkpoint=self.checkpoint,
            resume=self.resume,
            checkpoint_every=self.checkpoint_every,
            progress=self.progress(),
        )
        if split_seconds is not None:
            with self.progress() as progress:
                outcome.split = train.split_time(
                    settings,
                    dataset,
                    seconds=split_seconds,
                    progress=lambda fraction: progress.update("parts of a step", fraction),
                )
        return outcome, settings, dataset

    def finish(
        self,
        outcome: Outcome,
        command: str,
        verdict: Verdict | None = None,
        race: Result | None = None,
    ) -> None:
        """Write the report and print it."""
        from fused_dni.experiments.train import result
        from fused_dni.report.blocks import Heading, Text
        from fused_dni.report.kinds import race as races
        from fused_dni.report.kinds import train as kind

        report = result(outcome, command, verdict, race)
        said: list[Block] = [kind.summary(outcome)]
        if outcome.split is not None:
            said.append(kind.split(outcome.split))
        said += map(Text, outcome.notes)
        if verdict is not None:
            said += [Text(verdict.table()), Text(verdict.sentence()), Text(kind.beside(outcome))]
        if race is not None:
            said += [
                Heading("Under an expensive top"),
                races.table(race),
                Text(races.sentence(race)),
            ]
        _finish(self, self.folder, report, said)


@dataclass(kw_only=True)
class Train(_OfThePaper):
    """Train the network of Jaderberg et al. 2016 (hidden layers of Linear, BatchNorm, ReLU) by
    stock backprop, by backprop on our kernels and by cDNI, epoch by epoch in turn, and write a
    report: error and wall-clock of each, where a step's time goes, two plots."""

    name = "train"
    summary = "train the paper's network by backprop and by DNI, side by side"
    epilog = f"recurrent networks: {', '.join(f'{PROGRAM} train {task}' for task in TASKS)}"

    out: str | None = option(None, FOLDER, "report folder (runs/DATASET)", group="output")
    split_seconds: float = option(4.0, SECONDS, "time for measuring the parts of a step")
    no_split: bool = option(False, help="do not measure them")

    def run(self, command: str) -> int:
        outcome, _, _ = self.train(None if self.no_split else self.split_seconds)
        self.finish(outcome, command)
        return 0


@dataclass(kw_only=True)
class Demo(_OfThePaper):
    """Train the paper's network on the embedded digits (or MNIST), measure what its layers cost by
    backprop and by DNI on this machine; then race an autoencoder under a loss of frozen
    convolutional features. Two to three minutes on 2 cores with the digits, once installed."""

    name = "demo"
    summary = (
        "train on real digits: inside a network, with the verdict for its layers on this machine, "
        "and under an expensive top"
    )
    without = ("interface",)

    out: str | None = option("runs/demo", FOLDER, "report folder", group="output")
    seconds: float = option(6.0, SECONDS, "time for the verdict")
    no_compile: bool = option(False, help="leave compiled backprop out")
    race: float = option(8.0, SECONDS, "of each arm and seed under the expensive top")

    def run(self, command: str) -> int:
        from fused_dni.experiments import data, nets, perceptual
        from fused_dni.measure.race import race
        from fused_dni.measure.verdict import verdict

        outcome, settings, dataset = self.train(3.0)
        rows = data.permutation(len(dataset.train.labels), 0, 0)[: settings.batch_size]
        images, labels = data.pick(dataset.train, rows)
        network = nets.plain(dataset.features, settings.hidden, settings.depth, dataset.classes)
        with self.progress() as progress:
            found = verdict(
                network,
                images,
                target=labels,
                update=settings.rule(settings.lr, settings.weight_decay),
                context_features=dataset.classes,
                rank=settings.rank,
                seconds=self.seconds,
                parts=False,
                compile=not self.no_compile,
                compile_limit=45.0,
                backend=settings.backend,
                title=f"{settings.depth} hidden layers of {settings.hidden} (Linear, BatchNorm, "
                f"ReLU) at batch {settings.batch_size} with {settings.update.capitalize()}",
                progress=progress.update,
            )
        raced = race(
            perceptual.arms(perceptual.Images(dataset)),
            seconds=self.race,
            seeds=settings.seeds[:2],
            progress=self.progress(),
            command=command,
        )
        self.finish(outcome, command, found, raced)
        return 0


#: Settings of ``train rows`` that other commands do not have.
ROWS_ALONE = ("condition", "sg_lambda", "full", "held_out")


@dataclass(kw_only=True)
class _OnSequences(Checkpointed):
    """Train an LSTM in windows: what the recurrent commands share."""

    settings = Recurrent

    out: str | None = option(None, FOLDER, "report folder (runs/TASK)", group="output")
    seconds: float = option(4.0, SECONDS, "of timing, all arms together")
    memory: bool = option(
        False, help="measure peak memory against window and length of the sequence"
    )

    def check(self) -> None:
        super().check()
        self.settings.of(self.subject, **self.given)

    def source(self, settings: Recurrent, progress: Progress) -> Characters | Dataset | None:
        """Read what the net is trained on, if there is anything to read, and say what it is."""
        return None

    def run(self, command: str) -> int:
        from fused_dni.experiments import recurrent
        from fused_dni.measure import memory
        from fused_dni.report.blocks import Text
        from fused_dni.report.kinds import recurrent as kind

        settings: Recurrent = self.settings.of(self.subject, **self.given)
        out = self.out or f"runs/{self.subject}"
        progress = self.progress()
        source = self.source(settings, progress)
        for arm in settings.arms():  # what does not fit shows before anything runs
            recurrent.build(arm, settings.seeds[0], settings, source)
        self.refuse_folders(out)
        outcome = recurrent.train(
            settings,
            source,
            checkpoint=self.checkpoint,
            resume=self.resume,
            checkpoint_every=self.checkpoint_every,
            progress=progress,
        )
        with self.progress() as progress:
            outcome.costs = recurrent.costs(
                settings,
                source,
                seconds=self.seconds,
                progress=lambda fraction: progress.update("costs", fraction),
            )
            if self.memory:
                outcome.memory_curve = memory.memory_curve(
                    batch=settings.batch_size,
                    inputs=settings.hidden,
                    hidden=settings.hidden,
                    layers=settings.layers,
                    backend=settings.backend,
                    progress=lambda fraction: progress.update("memory curve", fraction),
                )
        said: list[Block] = [kind.summary(outcome)]
        if settings.probe:
            said.append(kind.future_table(outcome))
        if outcome.memory_curve:
            said.append(kind.memory_table(outcome.memory_curve))
        made = recurrent.result(outcome, command).described()
        said += [Text(made.sentence), *map(Text, outcome.notes)]
        _finish(self, out, made, said)
        return 0


@dataclass(kw_only=True)
class TrainCharacters(_OnSequences):
    """Train an LSTM in windows of T steps by truncated backprop and by DNI, with and without the
    auxiliary head, in turn and on the same data, and write a report: validation bits per character
    against characters seen and against wall-clock, and how much of the gap to a longer window DNI
    closes at what memory."""

    name = "train charlm"
    summary = "an LSTM on the characters of a text: truncated backprop and DNI"
    subject = "charlm"
    without = ("task", "width", "threshold", "smoothing", "ablate", *ROWS_ALONE)
    renamed: ClassVar = {"amount": "characters"}

    data: str | None = option(
        None,
        PATH,
        "a UTF-8 text (.gz too), or a folder of .txt and .txt.gz files",
        group="data",
    )

    def source(self, settings: Recurrent, progress: Progress) -> Characters:
        from fused_dni.experiments import characters

        if self.data is None:
            raise UsageError(f"charlm needs a text, --data PATH: {characters.HOW_TO_GET}")
        text = characters.load(self.data, settings.validation)
        progress.line(
            f"{text.name}: {len(text.train)} characters to train on, "
            f"{len(text.validation)} to validate on, {len(text.symbols)} symbols"
        )
        return text


@dataclass(kw_only=True)
class TrainCopy(_OnSequences):
    """Train an LSTM in windows of T steps by truncated backprop and by DNI, with and without the
    auxiliary head, in turn and on the same data, and write a report: the longest length solved
    against training steps, under a curriculum."""

    name = "train copy"
    summary = "an LSTM on the copy task: truncated backprop and DNI"
    subject = "copy"
    without = (
        "task",
        "validation",
        "update_every",
        "warmup",
        "embedding",
        "smoothing",
        *ROWS_ALONE,
    )
    renamed: ClassVar = {"amount": "steps"}


@dataclass(kw_only=True)
class TrainRepeatCopy(TrainCopy):
    __doc__ = TrainCopy.__doc__

    name = "train repeat-copy"
    summary = "likewise, on repeat-copy"
    subject = "repeat-copy"


@dataclass(kw_only=True)
class TrainRows(_OnSequences):
    """Train an LSTM that reads MNIST's images row by row, or pixel by pixel, with a loss at the end
    alone, in windows of T steps: by truncated backprop, by DNI, by what needs no future, and by
    full backprop, in turn and on the same data; and write a report: error against steps and
    wall-clock, and how much DNI recovers of what truncation loses, at what memory."""

    name = "train rows"
    summary = "an LSTM on MNIST row by row: truncated backprop, DNI, full backprop"
    subject = "rows"
    without = (
        *("task", "validation", "update_every", "warmup", "embedding"),
        *("width", "threshold", "smoothing", "ablate"),
    )
    renamed: ClassVar = {"amount": "steps"}
    worded: ClassVar = {
        "methods": "of backprop (nn.LSTM), fused (truncated backprop on our kernels), dni, "
        "dni+aux, dni+lambda (targets by --sg-lambda), local (a loss at every window's end), "
        "immediate (T = 1, RMSprop), immediate+local"
    }

    data: str | None = option(
        None, FOLDER, "folder of the four MNIST files (fetched once without)", group="data"
    )

    def source(self, settings: Recurrent, progress: Progress) -> Dataset:
        from fused_dni.experiments import data

        return data.load("mnist", folder=self.data, held_out=settings.held_out)


def _finish(asked: Measuring, out: str, report: Result, said: list[Block]) -> None:
    """Write the folder and print what was measured: that, too, where it cannot be written."""
    from fused_dni.report.blocks import as_text
    from fused_dni.report.errors import WriteError
    from fused_dni.report.files import as_json
    from fused_dni.report.folder import write_folder

    files: list[Path] = []
    failed: WriteError | None = None
    try:
        files = write_folder(report, out)
    except WriteError as error:
        failed = error
    if asked.json:
        say(as_json(report), end="")
    else:
        say("\n" + "\n\n".join([as_text(said), *["\n".join(map(str, files))] * bool(files)]))
    if failed is not None:
        raise failed
