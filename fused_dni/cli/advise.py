"""``advise``."""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from fused_dni.cli.arguments import factory, rule
from fused_dni.cli.command import Measuring, UsageError
from fused_dni.cli.output import out_file, say
from fused_dni.measure.options import ADVICE_SECONDS, FACTORY, SECONDS, SHAPE, UPDATE, option, whole


@dataclass(kw_only=True)
class Advise(Measuring):
    """Time every block of a model alone, predict from that where interfaces, which synthesizers
    and which k make a training step faster than backprop on the same kernels, convert the model
    accordingly, and print predicted time and memory beside measured ones."""

    name = "advise"
    kind = "advice"
    summary = "where in a whole model interfaces pay: predicted, then converted and measured"
    epilog = """examples:
  {program} advise mymodels:mlp --sample 128x784
  {program} advise mymodels:convnet --all --out advice.json

The module is looked for in the folder that the command is run in, too.
A factory is called without arguments and returns a module, (module, sample) or
(module, sample, loss). The loss is called with the module's output, returns a scalar,
and closes over its targets; without one a fixed gradient arrives at the output."""

    what: str = option(MISSING, FACTORY, "package.module:factory", place=True)
    sample: tuple[int, ...] | None = option(None, SHAPE, "of a batch, if it brings none")
    classes: int | None = option(
        None, whole(1), "condition synthesizers on labels of so many classes, drawn at random",
        group="method",
    )  # fmt: skip
    update: str = option("sgd", UPDATE, "update rule")
    all: bool = option(
        False, help="propose an interface behind every block that can have one, pay or not"
    )
    backend: str | None = option(None, help="force a backend of our kernels")
    seconds: float = option(ADVICE_SECONDS, SECONDS, "of measuring, all together")

    def run(self, command: str) -> int:
        from fused_dni.measure.advise import advise

        out = out_file(self)
        module, sample, rest = factory(self.what, self.sample, "loss")
        loss = rest[0] if rest else None
        if loss is not None and not callable(loss):
            raise UsageError(f"the loss of {self.what} must be callable, got {type(loss).__name__}")
        with self.progress() as progress:
            found = advise(
                module,
                sample,
                loss,
                update=rule(self.update),
                classes=self.classes or 0,
                all_blocks=self.all,
                seconds=self.seconds,
                backend=self.backend,
                title=self.what,
                command=command,
                progress=progress.update,
            )
        out.write(found.to_json() + "\n")
        say(found.to_json() if self.json else found.table())
        out.finish()
        return 0
