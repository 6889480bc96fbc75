"""Commands as dataclasses: their fields are the options, and those of the settings they run.

Our own hundred lines over argparse, after trying tyro 1.0 and jsonargparse 4.53: both check types
but no ranges, answer a typo in 5 to 12 lines, jsonargparse without the nearest name, and need 50 to
70 ms to be imported, of the 100 ms that help and bad arguments may take.
"""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from fused_dni.measure.options import FILE, THREADS, Option, option
from fused_dni.report import text

if TYPE_CHECKING:
    from fused_dni.report.progress import Progress

PROGRAM = "fused-dni"
#: Headings that stand at the beginning and at the end of help.
FIRST = ("", "data")
LAST = ("output", "checkpoints")


class UsageError(ValueError):
    """Bad input on the command line."""


@dataclass(kw_only=True)
class Command:
    """What was asked for: options are the fields, help is the class's docstring.

    Attributes:
        name: of the command, of one word or two.
        summary: what the list of commands says.
        epilog: what stands below its help; ``{program}`` in it is the program.
        usage: if another than argparse makes.
        settings: a dataclass whose fields are options, too; ``subject`` is the one of its presets
            that this command is for, if it is for one alone.
        without: those of its fields that are none here.
        renamed: those that have another name here.
        worded: those that help tells of in other words here.
        needs_library: whether it needs PyTorch to run.
        given: what was said of ``settings``.
        behind: what stands behind ``--``.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    epilog: ClassVar[str] = ""
    usage: ClassVar[str | None] = None
    settings: ClassVar[Any] = None
    subject: ClassVar[str] = ""
    without: ClassVar[tuple[str, ...]] = ()
    renamed: ClassVar[dict[str, str]] = {}
    worded: ClassVar[dict[str, str]] = {}
    needs_library: ClassVar[bool] = True
    given: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    behind: list[str] = field(default_factory=list, init=False, repr=False)

    def check(self) -> None:
        """Refuse what can be seen wrong before anything is imported."""

    def run(self, command: str) -> int:
        """Do it and return the exit status; ``command`` is for reports."""
        raise NotImplementedError


@dataclass(kw_only=True)
class Printing(Command):
    """A command that finds something, prints it, and writes it if asked to.

    Attributes:
        kind: of its report, where that is not the command's name.
    """

    kind: ClassVar[str] = ""
    json: bool = option(False, help="print the report as JSON on stdout", group="output")
    out: str | None = option(None, FILE, "write the JSON into a file", group="output")
    quiet: bool = option(False, help="no progress", group="output")

    def progress(self) -> Progress:
        """Make the bars, or lines, that tell how far it is; nothing if --quiet."""
        from fused_dni.report.progress import Progress

        return Progress(enabled=not self.quiet)


@dataclass(kw_only=True)
class Measuring(Printing):
    """A command that computes, on so many threads."""

    threads: int | None = option(
        None, THREADS, "CPU threads (torch's default otherwise)", group="output"
    )


class Parser(argparse.ArgumentParser):
    """One line for an error, with a suggestion for a typo."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        # No option of ours is a number: -5ms is a value, to be refused by its option in its words.
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:  # of commands alone
            names = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(None, text.unknown("command", str(value), names))

    def options(self) -> list[str]:
        """List all options that it knows."""
        return [option for action in self._actions for option in action.option_strings]


def _described(made: type) -> list[tuple[Field[Any], Option, str]]:
    """List the options of a dataclass, its own before those of its bases, with their headings."""
    parts = {part.name: part for part in fields(made) if "option" in part.metadata}
    found = []
    for owner in made.__mro__:
        title = ""
        for name in inspect.get_annotations(owner):
            if name in parts:
                part = parts.pop(name)
                title = part.metadata["option"].group or title
                found.append((part, part.metadata["option"], title))
    return found


def _of_settings(made: type[Command]) -> list[tuple[Field[Any], Option, str]]:
    """List the options of a command that are fields of its settings."""
    parts = [] if made.settings is None else _described(made.settings)
    return [part for part in parts if part[0].name not in made.without]


def flag_of(part: Field[Any]) -> str:
    """Name an option, without dashes in front."""
    return str(part.metadata["option"].flag or part.name).replace("_", "-")


def flags(command: Command) -> dict[str, str]:
    """Name a command's options, by field."""
    return {part.name: flag_of(part) for part, *_ in _described(type(command))}


def _default(of: Option, values: Iterable[tuple[str, Any]]) -> str:
    """Write the default as help says it, or by subject where they differ."""

    def shown(value: Any) -> str:
        each = value if of.several else (value,)
        return " ".join(map(of.kind.show, each)) or "none"

    said = {name: shown(value) for name, value in values if value not in (None, False)}
    if len(set(said.values())) > 1:
        return ", ".join(f"{name} {value}" for name, value in said.items())
    return next(iter(said.values()), "")


def _reader(of: Option, name: str) -> Any:
    def read(word: str) -> Any:
        try:
            return of.kind.parse(name, word)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _add_option(
    group: Any, part: Field[Any], of: Option, name: str, default: str, value: Any
) -> None:
    words = [of.help, f"({default})" if default and not of.help.endswith(")") else ""]
    more: dict[str, Any] = {"help": " ".join(filter(None, words)).replace("%", "%%")}
    if isinstance(part.default, bool):
        group.add_argument(f"--{name}", dest=part.name, action="store_true", **more)
        return
    metavar = of.kind.metavar
    if of.several and metavar is not None and "{" in metavar:
        metavar = "NAME"  # of names that the help line has
    said = metavar if of.place and metavar and metavar.isupper() else name
    more |= {"metavar": metavar, "nargs": of.several, "type": _reader(of, said)}
    if of.place:
        group.add_argument(part.name, **more)
    else:
        more["required"] = part.default is MISSING
        names = [*filter(None, [of.short]), f"--{name}"]
        group.add_argument(*names, dest=part.name, default=value, **more)


def add(commands: Any, made: type[Command], options: bool = True) -> None:
    """Add a command to argparse's subparsers, without its options if they will not be asked for."""
    if not options:
        commands.add_parser(made.name, help=made.summary)
        return
    width = shutil.get_terminal_size().columns - 2
    about = textwrap.fill(" ".join((made.__doc__ or "").split()), width)
    parser = commands.add_parser(
        made.name,
        help=made.summary,
        usage=made.usage,
        description=about,
        epilog=made.epilog.replace("{program}", PROGRAM),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(made=made)
    groups: dict[str, list[tuple[Any, ...]]] = {}
    for part, of, title in _of_settings(made):
        subjects = [made.subject] if made.subject else made.settings.PRESETS
        defaults = [(subject, made.settings.preset(subject, part.name)) for subject in subjects]
        name = made.renamed.get(part.name, flag_of(part))
        of = replace(of, help=made.worded.get(part.name, of.help))
        groups.setdefault(title, []).append((part, of, name, _default(of, defaults), None))
    for part, of, title in _described(made):
        default = None if part.default is MISSING else part.default
        row = (part, of, flag_of(part), _default(of, [("", default)]), default)
        groups.setdefault(title, []).append(row)
    for title in sorted(groups, key=lambda title: (title not in FIRST, title in LAST)):
        group = parser.add_argument_group(title) if title else parser
        for row in groups[title]:
            _add_option(group, *row)
    # Also behind the command; SUPPRESS keeps what was given in front of it.
    parser.add_argument(
        "--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


def read(args: argparse.Namespace, behind: list[str]) -> Command:
    """Make the command of what argparse has read; each value of several once."""
    values = {
        name: tuple(dict.fromkeys(value)) if isinstance(value, list) else value
        for name, value in vars(args).items()
    }
    made: type[Command] = args.made
    own = {part.name: values[part.name] for part, *_ in _described(made)}
    command = made(**own)
    command.behind = behind
    chosen = {part.name: values[part.name] for part, *_ in _of_settings(made)}
    command.given = {name: v for name, v in chosen.items() if v is not None and v is not False}
    return command
