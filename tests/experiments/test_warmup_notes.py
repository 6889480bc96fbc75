"""A run that is all warm-up says so: what it reports of synthetic gradients is backprop's."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from clusters import clusters

from fused_dni import cli
from fused_dni.experiments import rival_arms, rival_trainers, train
from fused_dni.experiments.run import warmup_notes
from fused_dni.report import as_text, blocks_of
from fused_dni.report.loaded import printable

TINY = train.Settings(
    dataset="digits", methods=("fused", "cdni"), target_every=(1, 0), hidden=4, depth=1, epochs=1,
    batch_size=16, rank=2, seeds=(0,),
)  # fmt: skip


@pytest.mark.parametrize(
    ("names", "warmup", "steps", "said"),
    [
        (["backprop", "cdni k=1", "dni k=never"], 10, 10, "All 10 steps of cdni k=1, dni k=never"),
        (["cdni k=4"], 99, 10, "All 10 steps of cdni k=4"),
        (["dni T=8"], 1, 1, "All 1 steps of dni T=8"),
        (["dni+aux T=8"], 3, 3, "dni+aux T=8"),
        (["cdni k=1"], 9, 10, None),
        (["cdni k=1"], 0, 1, None),
        (["backprop", "fused"], 99, 10, None),
    ],
)
def test_which_runs_are_all_warm_up(names, warmup, steps, said):
    notes = warmup_notes(names, warmup, steps)
    assert len(notes) == (said is not None)
    if said is not None:
        assert said in notes[0]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("warmup", "said"), [(9, False), (10, True), (44, True)])
def test_the_report_of_a_training_says_it(warmup, said):
    outcome = train.train(replace(TINY, warmup_steps=warmup), clusters(160, 50, 12))
    printed = as_text(blocks_of(train.result(outcome)))
    assert ("All 10 steps of cdni k=1, cdni k=never were warm-up" in printed) is said


def test_the_command_prints_and_keeps_it(capsys, tmp_path):
    before = torch.get_num_threads()
    argv = "train --epochs 2 --hidden 4 --depth 1 --seeds 0 --no-split --threads 1 --quiet"
    try:
        assert cli.main([*argv.split(), "--methods", "cdni", "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(before)
    assert "All 44 steps of cdni k=1, cdni k=4 were warm-up" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert len(report["notes"]) == 1 and report["settings"]["warmup_steps"] == 44
    assert "were warm-up" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["train", "demo"])
def test_the_help_says_how_long_the_warm_up_is(capsys, command):
    assert cli.main([command, "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    steps = {name: train.Settings.of(name).warmup_steps for name in ("mnist", "digits")}
    assert (
        f"an epoch of mnist, two of digits (mnist {steps['mnist']}, digits {steps['digits']})"
        in said
    )
    assert train.steps_per_epoch(train.Settings(), clusters(60_000, 1, 2)) == steps["mnist"]
    assert 2 * (1438 // train.Settings.of("digits").batch_size) == steps["digits"]


def test_a_share_of_a_few_steps_leaves_one():
    """Rivals' warm-up is a share below one; rounded it would be all of a short run."""
    settings = rival_arms.Settings.of("digits", warmup=0.99, hidden=4, depth=1)
    arm = rival_arms.arm("cdni-1")
    rule = settings.rule(1e-3)
    trainer = rival_trainers.build(arm, 0, settings, clusters(160, 50, 12), 10, rule, rule)
    assert trainer.schedule.warmup_steps == 9


def test_names_of_files_that_are_not_utf_8_can_be_shown():
    assert printable("caf\udce9 livre") == "caf\N{REPLACEMENT CHARACTER} livre"
    assert (
        printable("a\x1b[2J\0b\tc\n")
        == "a\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}b\tc\n"
    )
    assert printable("µ 漢字") == "µ 漢字"
