"""What the commands that run experiments share: data, checkpoints, unfinished results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_dni.cli.arguments import refuse_unwritable
from fused_dni.cli.command import Measuring, UsageError
from fused_dni.cli.output import kept_in, out_file, refuse_foreign, say_report, unfinished
from fused_dni.measure.options import FOLDER, PATH, option, whole

if TYPE_CHECKING:
    from fused_dni.experiments.data import Dataset
    from fused_dni.report.progress import Progress
    from fused_dni.report.schema import Experiment


@dataclass(kw_only=True)
class OnImages(Measuring):
    """A command that trains on digits or MNIST; its settings are checked before anything runs."""

    data: str | None = option(
        None, FOLDER, "folder of the four MNIST files (IDX, .gz)", group="data"
    )

    @property
    def dataset(self) -> str:
        """The name that --dataset and --data ask for."""
        known: str = self.given.get("dataset", "digits" if self.data is None else "mnist")
        return known

    def chosen(self, **more: Any) -> Any:
        """Make the settings."""
        return self.settings.of(self.dataset, **self.given, **more)

    def check(self) -> None:
        super().check()
        if self.data is not None and self.given.get("dataset") == "digits":
            raise UsageError("--data is for the MNIST files; leave --dataset digits out")
        self.chosen()

    def load(self, progress: Progress, *, held_out: bool = False) -> Dataset:
        """Load the images, with a bar for what is fetched."""
        from fused_dni.experiments import data

        def fetching(file: str, done: int, total: int) -> None:
            progress.update(f"fetching {file}", done / total if total > 0 else 0.0)

        with progress:
            return data.load(self.dataset, folder=self.data, held_out=held_out, progress=fetching)


@dataclass(kw_only=True)
class OnTexts(OnImages):
    """One that trains on the characters of a text, too."""

    data: str | None = option(
        None,
        PATH,
        "folder of the four MNIST files (IDX, .gz); with --dataset characters a text (.gz too), or "
        "a folder of .txt and .txt.gz files",
        group="data",
    )

    def check(self) -> None:
        if self.data is None and self.given.get("dataset") == "characters":
            raise UsageError("--dataset characters needs --data PATH, a text or a folder of texts")
        super().check()

    def load(self, progress: Progress, *, held_out: bool = False) -> Dataset:
        from fused_dni.experiments import characters

        if self.dataset != "characters":
            return super().load(progress, held_out=held_out)
        assert self.data is not None
        return characters.windows(self.data)


@dataclass(kw_only=True)
class Quick(OnImages):
    """One that has settings for a look."""

    quick: bool = option(False, help="a look, in seconds")

    def chosen(self, **more: Any) -> Any:
        return super().chosen(quick=self.quick, **more)


@dataclass(kw_only=True)
class Checkpointed(Measuring):
    """A command that trains, and may keep the state of the run."""

    checkpoint: str | None = option(
        None, FOLDER, "keep the state of the run in DIR", group="checkpoints"
    )
    checkpoint_every: int | None = option(
        None, whole(1), "steps (every 15 seconds, and whenever a curve gets a point)"
    )
    resume: bool = option(False, help="continue from --checkpoint DIR")

    def check(self) -> None:
        super().check()
        if self.resume and self.checkpoint is None:
            raise UsageError("--resume needs --checkpoint DIR")

    def refuse_folders(self, out: str) -> None:
        """Refuse, before anything runs, folders that the run could not write to."""
        refuse_foreign("--out", Path(out, "report.json"), self.kind or self.name)
        refuse_unwritable(out)
        if self.checkpoint is not None:
            refuse_unwritable(self.checkpoint)


@dataclass(kw_only=True)
class Resumable(Measuring):
    """A command whose --out is kept after every finished run, and gone on with."""

    resume: bool = option(False, help="go on with an unfinished --out", group="output")

    def begin(self, progress: Progress) -> Experiment:
        """Return what measures."""
        raise NotImplementedError

    def run(self, command: str) -> int:
        from fused_dni.measure.errors import Interrupted

        out = out_file(self, needed=True)
        previous = unfinished(str(self.out), self.name) if self.resume else None
        measure = self.begin(self.progress())
        try:
            with kept_in(out, self.json) as keep:
                report = measure(
                    previous=previous, keep=keep, progress=self.progress(), command=command
                )
        except Interrupted as stopped:
            raise Interrupted(
                f"{stopped} and are kept in {out.path}; --resume goes on from there"
            ) from None
        say_report(report, self.json, out)
        return 0
