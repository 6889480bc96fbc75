"""What each experiment is a function of, with the help of the commands that run them.

Nothing here imports PyTorch before a rule is made: commands are checked against these first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from typing_extensions import Self

from fused_dni.measure.options import (
    EVERY,
    INTERFACES,
    RATE,
    SEED,
    TEXT,
    UPDATE,
    Checked,
    above_zero,
    number,
    one_of,
    option,
    whole,
)
from fused_dni.report import text

if TYPE_CHECKING:
    from fused_dni.rules import Rule

S = TypeVar("S", bound="Settings")
#: A share of the steps, never all of them.
WARMUP = number(0.0, 1.0, below=True)
DATASET = one_of(("digits", "mnist"))
DATASETS = (
    "digits: embedded; mnist: fetched once and checked (default: digits, or mnist with --data)"
)


class Settings(Checked):
    """Base of what an experiment is a function of: a frozen dataclass, checked when it is made.

    Attributes:
        PRESETS: by subject (a dataset, a task), what it wants different from the defaults.
        SUBJECT: the field that names it.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]]
    SUBJECT: ClassVar[str] = "dataset"

    @classmethod
    def of(cls, subject: str, **changes: Any) -> Self:
        """Make the settings of a subject, with ``changes`` where they are not None.

        Raises:
            ValueError: an unknown subject, or settings that are out of range.
        """
        if subject not in cls.PRESETS:
            raise ValueError(text.unknown(cls.SUBJECT, subject, cls.PRESETS))
        given = {name: value for name, value in changes.items() if value is not None}
        return cls(**{cls.SUBJECT: subject, **cls.PRESETS[subject], **given})

    @classmethod
    def preset(cls, subject: str, name: str) -> Any:
        """Look up the default of a field for a subject."""
        default = next(part.default for part in fields(cls) if part.name == name)  # type: ignore[arg-type]
        return cls.PRESETS[subject].get(name, default)


@dataclass(frozen=True)
class OnImages(Settings):
    """Base of the settings of experiments on digits and MNIST. Defaults are MNIST's."""

    dataset: str = option("mnist", DATASET, DATASETS, group="data")
    hidden: int = option(256, whole(1), "units of a hidden layer", group="training")
    batch_size: int = option(256, whole(2), "rows of a step")


def rule_of(update: str, lr: float, weight_decay: float | None = None) -> Rule:
    """Make the rule ``sgd`` (with momentum 0.9), ``adam`` or ``adamw`` at a rate."""
    from fused_dni.rules import SGD, Adam, AdamW

    more: dict[str, Any] = {} if weight_decay is None else {"weight_decay": weight_decay}
    if update == "sgd":
        return SGD(lr, momentum=0.9, **more)
    return (Adam if update == "adam" else AdamW)(lr, **more)


METHODS = ("backprop", "compiled", "fused", "cdni", "dni")
#: Of synthesizers: ``fd.LinearSynthesizer`` and ``fd.CrossEntropySynthesizer``.
FORMS = ("linear", "cross-entropy")


@dataclass(frozen=True)
class Training(OnImages):
    """What ``train`` and ``demo`` are a function of."""

    PRESETS: ClassVar = {
        "mnist": {},
        "digits": {"epochs": 25, "batch_size": 64, "warmup_steps": 44},
    }

    methods: tuple[str, ...] = option(
        ("backprop", "fused", "cdni"),
        one_of(METHODS),
        "of backprop (stock modules, fused torch.optim), compiled (the same, by torch.compile), "
        "fused (backprop on our kernels), cdni (label-conditioned synthetic gradients), dni "
        "(unconditioned)",
        group="training",
    )
    target_every: tuple[int, ...] = option(
        (1, 4), EVERY, "train synthesizers on every K-th step; several are run side by side"
    )
    depth: int = option(3, whole(1), "hidden layers")
    epochs: int = option(8, whole(1), "passes over the training set")
    update: str = option("adam", UPDATE, "update rule of the network")
    lr: float = option(3e-3, RATE, "learning rate at the start, cosine to zero")
    weight_decay: float = option(0.0, RATE, "of the network")
    sg_lr: float = option(1e-3, RATE, "the synthesizers' rate, likewise")
    warmup_steps: int = option(
        234,
        whole(0),
        "steps on true gradients while synthesizers learn: an epoch of mnist, two of digits",
    )
    mix: float = option(
        0.0, number(0.0, 1.0), "weight of the true gradient on steps with targets; 1: exact there"
    )
    lessons: int = option(1, whole(1), "regression steps of a synthesizer on a step with targets")
    synthesizer: str = option(
        "linear", one_of(FORMS), "cross-entropy: of the form that a classifier's gradient has"
    )
    rank: int = option(16, whole(0), "of linear synthesizers; 0: dense")
    interface: str = option(
        "output",
        one_of(INTERFACES),
        "where synthesizers predict the gradient: at a layer's output, or before its normalisation "
        "and activation",
    )
    seeds: tuple[int, ...] = option((0, 1, 2), SEED, "one run of every method each")
    held_out: bool = option(
        False, help="evaluate on the last sixth of the training set, kept out of training"
    )
    backend: str | None = option(None, TEXT, "force a backend of our kernels")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.synthesizer == "cross-entropy" and "dni" in self.methods:
            raise ValueError(
                "synthesizer='cross-entropy' is told the label: leave the method 'dni' out"
            )

    def rule(self, lr: float, weight_decay: float = 0.0) -> Rule:
        """Make the update rule at a rate."""
        return rule_of(self.update, lr, weight_decay)

    def runs(self) -> list[str]:
        """Name the runs of one seed, in the order of reports: ``cdni`` once for each k."""
        names = []
        for method in self.methods:
            if method in ("cdni", "dni"):
                names += [f"{method} k={k or 'never'}" for k in self.target_every]
            else:
                names.append(method)
        return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Interfaces(OnImages):
    """What ``interfaces`` is a function of."""

    PRESETS: ClassVar = {"mnist": {}, "digits": {"batch_size": 64, "steps": 500}}

    depths: tuple[int, ...] = option(
        (1, 2, 4, 8),
        whole(1),
        "numbers of hidden layers, each with an interface behind every one",
        group="training",
    )
    every: tuple[int, ...] = option(
        (1, 2, 4), whole(1), "in the deepest, an interface behind every N-th layer"
    )
    steps: int = option(1000, whole(1), "of training, for every network")
    batches: int = option(
        10, whole(1), "over which the comparison with the true gradient is averaged"
    )
    lr: float = option(3e-3, RATE, "Adam's rate at the start, cosine to zero")
    sg_lr: float = option(1.5e-3, RATE, "the synthesizers', likewise")
    warmup: float = option(0.1, WARMUP, "share of the steps on true gradients")
    rank: int = option(16, whole(0), "of the synthesizers; 0: dense")
    seeds: tuple[int, ...] = option((1, 2, 3), SEED, "one run of every network each")
    backend: str | None = option(None, TEXT, "force a backend of our kernels")

    def __post_init__(self) -> None:
        super().__post_init__()
        deepest = max(self.depths)
        for every in self.every:
            if deepest % every:
                raise ValueError(
                    f"every must divide the largest depth, {deepest}, so that the topmost layer "
                    f"has an interface, got {every}"
                )

    def networks(self) -> list[tuple[int, int]]:
        """List depth and spacing of the interfaces (0: none, backprop) of every network."""
        deepest = max(self.depths)
        spaced = [(depth, 1) for depth in self.depths]
        spaced += [(deepest, every) for every in self.every]
        return list(dict.fromkeys([*((depth, 0) for depth in self.depths), *spaced]))


MODES = ("exact", "stale", "local", "decoupled")
TARGETS = ("bootstrapped", "true")


@dataclass(frozen=True)
class Staged(OnImages):
    """What ``train pipeline`` is a function of, but for how fast the processes are."""

    PRESETS: ClassVar = {
        "digits": {"epochs": 25},
        "mnist": {"batch_size": 256, "warmup_steps": 234},
    }

    dataset: str = option("digits", DATASET, DATASETS, group="data")
    #: Of the MNIST files; None to fetch them.
    folder: str | None = None
    batch_size: int = option(64, whole(2), "rows of a step")
    stages: int = option(2, whole(1), "processes", group="training")
    modes: tuple[str, ...] = option(MODES, one_of(MODES), "of exact, stale, local, decoupled (all)")
    depth: int = option(4, whole(1), "hidden layers in all stages together")
    epochs: int = option(8, whole(1), "passes over the training set")
    lr: float = option(3e-3, RATE, "Adam's rate at the start, cosine to zero")
    rank: int = option(16, whole(1), "of the synthesizers")
    target_every: int = option(
        1, whole(1), "a gradient comes back on every so many steps of the decoupled run"
    )
    targets: str = option(
        TARGETS[0], one_of(TARGETS), "what a decoupled stage sends down, at once or later"
    )
    warmup_steps: int = option(
        44, whole(0), "on which its stages wait for the true gradient, at the start"
    )
    window: int = option(4, whole(1), "messages on their way")
    lag: int | None = option(None, whole(0), "use gradients exactly so many steps late")
    seed: int = option(0, SEED, "of weights and batches")
    checkpoint_every: int = option(100, whole(1), "steps", group="checkpoints")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < self.stages:
            raise ValueError(
                f"depth={self.depth} hidden layers are too few for {self.stages} stages: each has "
                "one at least"
            )


TASKS = ("charlm", "copy", "repeat-copy", "rows")
SYNTHESIZERS = ("default", "linear", "mlp")
LSTM_METHODS = ("backprop", "fused", "dni", "dni+aux")
ROWS_METHODS = ("dni+lambda", "local", "immediate", "immediate+local")
CONDITIONS = ("none", "label", "step", "both")
ABLATIONS = ("zero", "negated", "shuffled", "mean", "noise", "true")
_COPY: dict[str, Any] = {
    "windows": (4,),
    "long": (),
    "hidden": 128,
    "lr": 1e-3,
    "exact_lr": 3e-4,
    "clip": 0.25,
    "synthesizer": "linear",
    "sg_scale": 1.0,
    "target_clip": 1.0,
    "warmup": 0.0,
    "cosine": False,
    "amount": 12_000,
    "width": 1,
    "evaluations": 100,
    "seeds": (0, 1, 2),
}
# With the whole prediction a trial stalled at 19 steps; with 0.3 it went on: docs/recurrent.md.
_REPEAT_COPY = _COPY | {"sg_scale": 0.3}
_ROWS: dict[str, Any] = {
    "methods": ("fused", "dni"),
    "windows": (1, 4, 7, 14),
    "long": (28,),
    "hidden": 64,
    "batch_size": 128,
    "lr": 2e-3,
    "sg_lr": 3e-4,
    "sg_scale": 1.0,
    "synthesizer": "linear",
    "condition": "both",
    "warmup": 0.0,
    "amount": 1000,
    "evaluations": 4,
    "seeds": (0, 1, 2, 3, 4),
}


@dataclass(frozen=True)
class Arm:
    """A method of ``train charlm`` and the like, at a window."""

    method: str
    window: int

    @property
    def name(self) -> str:
        """As it stands in reports."""
        return f"{self.method} T={self.window}"

    @property
    def synthetic(self) -> bool:
        """Whether it predicts gradients."""
        return self.method.startswith("dni")


@dataclass(frozen=True)
class Recurrent(Settings):
    """What ``train charlm``, ``copy``, ``repeat-copy`` and ``rows`` are a function of, besides the
    text or the images. Defaults are charlm's."""

    PRESETS: ClassVar = {
        "charlm": {},
        "copy": _COPY,
        "repeat-copy": _REPEAT_COPY,
        "rows": _ROWS,
    }
    SUBJECT: ClassVar = "task"

    task: str = option("charlm", one_of(TASKS), group="data")
    #: charlm alone, of the text.
    validation: float = option(0.05, above_zero(), "share kept at the end, to validate on")
    methods: tuple[str, ...] = option(
        ("fused", "dni", "dni+aux"),
        one_of((*LSTM_METHODS, *ROWS_METHODS)),
        "of backprop (nn.LSTM), fused (truncated backprop on our kernels), dni, dni+aux",
        group="arms",
    )
    windows: tuple[int, ...] = option((8,), whole(1), "of all methods")
    #: To measure the gap by.
    long: tuple[int, ...] = option(
        (40,), whole(1), "windows of truncated backprop alone", several="*"
    )
    seeds: tuple[int, ...] = option((0,), SEED, "one run of every arm each")
    ablate: tuple[str, ...] = option(
        (),
        one_of(ABLATIONS),
        "further arms of dni in which something else is injected: zero, negated, shuffled (over "
        "rows), mean (of rows), noise, true (the true gradient), the last two of its norm",
        several="*",
    )
    hidden: int = option(256, whole(1), "units of the LSTM", group="training")
    layers: int = option(1, whole(1), "of the LSTM")
    batch_size: int = option(32, whole(1), "streams, episodes or images")
    amount: int = option(10_000_000, whole(1), "characters, or batches, of every arm")
    #: charlm: gradients are summed over the windows in between. Without it a long window means few
    #: updates, and arms differ in more than their gradients.
    update_every: int = option(
        0, whole(0), "sum gradients over so many steps of a stream; 0: an update every window"
    )
    #: For charlm alone: windows without a loss would teach that nothing matters.
    warmup: float = option(
        0.3, number(0.0, 1.0), "share of the run in which synthesizers only learn"
    )
    embedding: int = option(64, whole(0), "its size; 0: one-hot")
    width: int = option(8, whole(1), "bits of a symbol")
    threshold: float = option(
        0.15, above_zero(1.0), "bits of error, a bit, below which a length is solved"
    )
    #: Copy tasks: weight of the newest batch in the running error.
    smoothing: float = option(0.1, above_zero(1.0))
    #: Copy tasks: the first window of an episode has a random length in 1..T, so that no symbol
    #: always falls on the same side of a boundary.
    offset: bool = True
    lr: float = option(2e-3, RATE, "Adam's rate")
    exact_lr: float = option(0.0, RATE, "that of truncated backprop, if another; 0: the same")
    sg_lr: float = option(1e-4, RATE, "that of synthesizer and auxiliary head")
    #: Both rates fall to zero along a cosine; constant otherwise.
    cosine: bool = True
    #: Of all parameters but the synthesizer's.
    clip: float = option(1.0, RATE, "bound of the gradient's norm; 0: none")
    sg_scale: float = option(0.3, RATE, "factor on the synthetic gradient")
    target_clip: float = option(0.0, RATE, "bound of the synthesizer's target by row; 0: none")
    #: Times the gradient of the loss summed over steps and rows.
    target_scale: float = option(1.0, above_zero(), "factor on the synthesizer's target")
    synthesizer: str = option(
        "default", one_of(SYNTHESIZERS), "the module's, dense, or one hidden layer"
    )
    sg_hidden: int = option(256, whole(1), "hidden units of mlp")
    condition: str = option(
        "none",
        one_of(CONDITIONS),
        "what the synthesizer is told besides the state: none, label (the image's), step (which "
        "boundary it is), both",
    )
    sg_lambda: float = option(
        0.9, number(0.0, 1.0), "of dni+lambda's targets; 0: bootstrapped, 1: true gradients"
    )
    full: bool = option(
        False, help="one pixel a step, in one random order (784 steps), instead of a row"
    )
    held_out: bool = option(
        False, help="evaluate on the last sixth of the training set, kept out of training"
    )
    backend: str | None = option(None, TEXT, "force a backend of our kernels")
    evaluations: int = option(20, whole(1), "points of the curves", group="output")
    #: At every evaluation, and at the end what truncation leaves out: see ``experiments.future``.
    probe: bool = option(
        False,
        help="measure the true gradient of the future at boundaries, beside the window's own and "
        "beside what the synthesizer predicts",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup and self.task != "charlm":
            raise ValueError(f"warmup must be 0 for {self.task}, got {self.warmup}")
        if self.ablate and self.task not in ("copy", "repeat-copy"):
            raise ValueError(f"ablate is for the copy tasks, not for {self.task}")
        if self.task != "rows":
            for method in self.methods:
                if method in ROWS_METHODS:
                    raise ValueError(f"methods: {method!r} is for rows, not for {self.task}")

    def divisor(self, arm: Arm) -> int:
        """Return what the loss of a window, summed over its steps and rows, is divided by."""
        if self.task == "rows":  # one loss an image
            return self.batch_size
        return max(arm.window, self.update_every) * self.batch_size

    def arms(self) -> list[Arm]:
        """List the arms of one seed, in the order of reports; the long windows last."""
        made = [
            Arm(method, 1 if method.startswith("immediate") else window)
            for window in self.windows
            for method in self.methods
        ]
        made += [Arm(f"dni/{change}", w) for w in self.windows for change in self.ablate]
        exact = [m for m in self.methods if m in ("backprop", "fused")] or ["fused"]
        made += [Arm(method, window) for window in self.long for method in exact]
        return list(dict.fromkeys(made))
