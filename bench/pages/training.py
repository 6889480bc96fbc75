"""Tables of ``fused-dni train``: errors, ranks, recurrent nets."""

from __future__ import annotations

import statistics
from typing import Any

from fused_dni.report.blocks import as_markdown
from fused_dni.report.kinds import recurrent as recurrent_report
from fused_dni.report.text import count
from pages.cells import table, where
from stored import RESULTS


def render_training(report: dict[str, Any]) -> str:
    """Errors and wall-clock of one ``fused-dni train`` run."""
    facts, settings = report["facts"], report["settings"]
    stock = report["summary"][0]["seconds_per_epoch"]
    names = {
        "backprop": "stock backprop, eager, fused optimizer",
        "fused": "backprop on our kernels",
        "cdni k=1": "cDNI, targets on every step",
        "cdni k=4": "cDNI, targets on every 4th step",
    }
    rows = [
        [
            names.get(row["name"], row["name"]),
            _error(row),
            f"{row['seconds_per_epoch'] * 1e3:.0f}",
            f"{row['seconds_per_epoch'] / stock:.2f}",
            f"{row['seconds_to_threshold']:.2f} s"
            if row["seconds_to_threshold"]
            else "not reached",
        ]
        for row in report["summary"]
    ]
    header = ["", f"error, {report['evaluated_on']}", "epoch, ms", "÷ first row"]
    header.append(f"to {report['summary'][0]['threshold']:.0%}")
    text = (
        f"{where(facts)}: `{facts['command']}`. {settings['depth']} hidden layers of "
        f"{settings['hidden']}, batch {settings['batch_size']}, {settings['epochs']} epochs, "
        f"{count(len(settings['seeds']), 'seed')} (mean, range), {settings['update']} at "
        f"{settings['lr']:g}, synthesizers of rank {settings['rank'] or 'O (dense)'} at "
        f"{settings['sg_lr']:g}, {settings['warmup_steps']} steps of warm-up."
    )
    return f"{text}\n\n{table(header, rows)}"


def _error(row: dict[str, Any]) -> str:
    return f"{row['error_mean']:.2%} ({row['error_min']:.2%}–{row['error_max']:.2%})"


def render_recurrent(report: dict[str, Any]) -> str:
    """Say what one recurrent run of ``fused-dni train`` came to."""
    outcome, facts = recurrent_report.outcome_of(report), report["facts"]
    s = outcome.settings
    said = (
        f"{where(facts)}: `{facts['command']}`. LSTM {s.hidden}, batch {s.batch_size}, "
        f"{s.amount:,} {outcome.axis} an arm, {count(len(s.seeds), 'seed')} (mean, range)."
    )
    rows = as_markdown([recurrent_report.summary(outcome)], RESULTS)
    return f"{said}\n\n{rows}\n\n{report.sentence}"


def render_ablation(report: dict[str, Any]) -> str:
    """Say what one ``fused-dni train copy --ablate`` run came to: lengths at half of the training
    and at its end, and the cosines of rows over all of it."""
    outcome, facts = recurrent_report.outcome_of(report), report["facts"]
    s = outcome.settings
    rows = []
    for name in outcome.names():
        histories = [run["history"] for run in outcome.of(name)]
        cells = []
        for share in (0.5, 1.0):
            found = [h[max(0, round(share * len(h)) - 1)]["solved"] for h in histories]
            cells.append(f"{statistics.fmean(found):.3g} ({min(found):g}–{max(found):g})")
        probed = [row["prediction"] for h in histories for row in h if row.get("prediction")]
        cosines = [p.get("prediction_row_cosine") for p in probed]
        cosines = [cosine for cosine in cosines if cosine is not None]  # no row to take it of
        above = sum(cosine > 0 for cosine in cosines)
        cells.append(
            f"{statistics.fmean(cosines):+.3f} ({above} of {len(cosines)} above 0)"
            if cosines
            else "–"
        )
        rows.append([name, *cells])
    said = (
        f"{facts['device']}, torch {facts['torch']}, {facts['date']}, commit {facts['commit']}: "
        f"`{facts['command']}`. LSTM {s.hidden}, {count(len(s.seeds), 'seed')} (mean, range). "
        "Cosine: of what the synthesizer has learned with the true gradient, row by row, each row "
        "counting as one, at every evaluation."
    )
    header = ["injected", f"solved after {s.amount // 2:,} batches", f"{s.amount:,}", "cosine"]
    return f"{said}\n\n{table(header, rows)}"


def render_future(report: dict[str, Any]) -> str:
    """Render the true gradient of the future beside the window's own, and beside what was
    predicted; nothing of a run that did not probe it."""
    outcome = recurrent_report.outcome_of(report)
    if not outcome.settings.probe:
        return ""
    left_out = as_markdown([recurrent_report.future_table(outcome)], RESULTS)
    shares = (0.1, 0.25, 0.5, 0.75, 1.0)
    rows = []
    for name in outcome.names():
        runs = [[r for r in run["history"] if r.get("prediction")] for run in outcome.of(name)]
        if not all(runs) or not any("prediction_cosine" in r["prediction"] for r in runs[0]):
            continue
        fitted = [run.get("fitted_row_cosine") for run in outcome.of(name)]
        known = [cosine for cosine in fitted if cosine is not None]
        for key in ("cosine", "norm_ratio", *["row_cosine"] * bool(known)):
            cells = []
            for share in shares:
                at = [run[max(0, round(share * len(run)) - 1)]["prediction"] for run in runs]
                found = [r[f"prediction_{key}"] for r in at if r[f"prediction_{key}"] is not None]
                cells.append(f"{statistics.median(found):.3f}" if found else "-")
            rows.append([f"{name}, {key.replace('_', ' ')}", *cells])
        if known:
            cell = f"{statistics.median(known):.3f}"
            rows.append([f"{name}, row cosine of the best linear fit", *["-"] * 4, cell])
    header = ["prediction against truth, by share of the training"]
    predicted = table([*header, *(f"{share:.0%}" for share in shares)], rows)
    return f"{left_out}\n\n{predicted}"


def render_ranks(reports: list[dict[str, Any]]) -> str:
    """Error by rank of the synthesizer, one ``fused-dni train --held-out --rank`` run each."""
    if not reports:
        return "Not measured yet."
    reports = sorted(reports, key=lambda report: report["settings"]["rank"] or 10**9)
    names = [row["name"] for row in reports[0]["summary"]]
    rows = [
        [
            str(report["settings"]["rank"] or "dense"),
            *map(_error, report["summary"]),
        ]
        for report in reports
    ]
    facts = reports[0]["facts"]
    text = (
        f"Error, {reports[0]['evaluated_on']}, mean and range of "
        f"{count(len(reports[0]['settings']['seeds']), 'seed')}. "
        f"{where(facts)}: `{facts['command']}`."
    )
    return f"{text}\n\n{table(['rank', *names], rows)}"
