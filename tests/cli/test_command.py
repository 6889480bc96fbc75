"""Commands that are made of dataclasses: what every option has, and who checks it."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields

import pytest

from fused_dni import cli
from fused_dni.cli.command import _described, _of_settings
from fused_dni.cli.program import COMMANDS
from fused_dni.experiments.delay_settings import Settings as Delay
from fused_dni.experiments.literature_settings import Settings as Literature
from fused_dni.experiments.recipe_settings import Settings as Recipes
from fused_dni.experiments.rival_arms import Settings as Rivals
from fused_dni.experiments.settings import Interfaces, Recurrent, Staged, Training
from fused_dni.measure import options

SETTINGS = (Training, Recurrent, Interfaces, Staged, Rivals, Delay, Recipes, Literature)


@pytest.mark.parametrize("made", COMMANDS, ids=lambda made: made.name)
def test_every_option_has_help_and_a_default_that_is_allowed(made):
    for part, of, _ in [*_of_settings(made), *_described(made)]:
        assert of.help, part.name
        if part.default not in (MISSING, None):
            of.check(part.name, part.default)


@pytest.mark.parametrize("made", COMMANDS, ids=lambda made: made.name)
def test_what_measures_prints_and_writes_json(made):
    names = {part.name for part, *_ in _described(made)}
    assert "json" in names
    assert "out" in names or made.name in ("env", "report")


@pytest.mark.parametrize("made", SETTINGS, ids=lambda made: made.__module__)
def test_presets_are_of_fields_and_allowed(made):
    known = {part.name for part in fields(made)}
    for subject, preset in made.PRESETS.items():
        assert preset.keys() <= known
        found = made.of(subject)
        assert getattr(found, made.SUBJECT) == subject
        for name in known - {made.SUBJECT}:
            assert getattr(found, name) == made.preset(subject, name)


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("epochs", 0, "0"),
        ("lr", -1.0, "-1"),
        ("update", "adma", "adma"),
        ("methods", ("cndi",), "cndi"),
        ("target_every", (-1,), "-1"),
    ],
)
def test_a_program_and_a_command_are_refused_by_the_same_words(capsys, name, value, word):
    with pytest.raises(ValueError) as refused:
        Training.of("digits", **{name: value})
    flag = name.replace("_", "-")
    assert cli.main(["train", f"--{flag}={word}"]) == 2
    said = capsys.readouterr().err
    sentence = str(refused.value).replace(name, flag).partition(", got")[0]
    assert sentence in said and repr(word) in said


def test_help_shows_the_defaults_of_each_dataset(capsys):
    assert cli.main(["train", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "passes over the training set (mnist 8, digits 25)" in said
    assert "units of a hidden layer (256)" in said


@pytest.mark.parametrize(
    ("kind", "word", "value"),
    [
        (options.TIME, "4ms", 0.004),
        (options.TIME, "0", 0.0),
        (options.TIME, "1min", 60.0),
        (options.SIZE, "512KiB", 2.0**19),
        (options.SHARE, "5%", 0.05),
        (options.EVERY, "never", 0),
        (options.SHAPE, "64x784", (64, 784)),
        (options.whole(1, 3), "3", 3),
        (options.above_zero(1.0), "1", 1.0),
    ],
)
def test_values_are_read_and_shown(kind, word, value):
    found = kind.parse("it", word)
    assert found == pytest.approx(value) and type(found) is type(value)
    if kind in (options.TIME, options.SIZE, options.SHARE, options.EVERY):
        assert kind.parse("it", kind.show(found)) == pytest.approx(value)


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (options.TIME, "4"),
        (options.TIME, "4parsec"),
        (options.SPAN, "0s"),
        (options.SHARE, "101%"),
        (options.EVERY, "0"),
        (options.SHAPE, "64"),
        (options.SHAPE, "0x3"),
        (options.whole(1, 3), "4"),
        (options.whole(1), "1.5"),
        (options.number(), "inf"),
        (options.number(0.0, 1.0, below=True), "1"),
        (options.above_zero(), "nan"),
        (options.FACTORY, "linear"),
        (options.DEVICE, "gpu"),
    ],
)
def test_what_is_no_value_is_refused_with_what_was_given(kind, word):
    with pytest.raises(ValueError, match=f"it.* '?{word}'?"):
        kind.parse("it", word)


def test_a_number_that_is_none_is_refused_in_a_program():
    with pytest.raises(ValueError, match="lr must be a finite number from 0 on, got nan"):
        Training.of("digits", lr=math.nan)


@pytest.mark.parametrize(
    ("command", "texts"),
    [
        *((name, False) for name in ("train", "demo", "delay", "interfaces", "recipes")),
        ("literature", False),
        ("rivals", True),
        ("rivals grid", True),
    ],
)
def test_a_text_is_spoken_of_where_it_may_be_given(command, texts, capsys):
    assert cli.main([*command.split(), "--help"]) == 0
    assert ("with --dataset characters" in " ".join(capsys.readouterr().out.split())) == texts
    assert cli.main([*command.split(), "--dataset", "characters"]) == 2
    said = "--dataset characters needs --data PATH" if texts else "unknown dataset"
    assert said in capsys.readouterr().err
